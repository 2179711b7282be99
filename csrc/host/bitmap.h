#pragma once

#include <cstdint>
#include <vector>

namespace taskgroup {

// Pixels of an image [H, W], 64 of a row in one word: column 64 k + j is bit j of word k. Empty
// words lie around the image: one row above and one below, and one word to the left and right of
// each row.
struct Bitmap {
  int64_t height, width;
  int64_t stride;               // words from a row to the next one
  std::vector<uint64_t> words;  // [(height + 2) * stride + 1]

  Bitmap(int64_t height, int64_t width)
      : height(height),
        width(width),
        stride((width + 63) / 64 + 1),  // the word right of a row is the one left of the next row
        words((height + 2) * stride + 1, 0) {}

  // The index of the first word of a row, -1 to `height`.
  int64_t row(int64_t y) const { return (y + 1) * stride + 1; }

  bool operator()(int64_t y, int64_t x) const { return words[row(y) + x / 64] >> x % 64 & 1; }
  void set(int64_t y, int64_t x) { words[row(y) + x / 64] |= uint64_t{1} << x % 64; }
  void clear(int64_t y, int64_t x) { words[row(y) + x / 64] &= ~(uint64_t{1} << x % 64); }

  // Sets the pixels for which `is_set(index)` is true; the index counts row by row.
  template <typename Function>
  void assign(Function is_set) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t first = 0; first < width; first += 64) {
        const int64_t n = width - first < 64 ? width - first : 64;
        uint64_t word = 0;
        for (int64_t j = 0; j < n; ++j) {
          word |= static_cast<uint64_t>(is_set(y * width + first + j) ? 1 : 0) << j;
        }
        words[row(y) + first / 64] = word;
      }
    }
  }

  // Calls `function(index)` for every pixel that is set; the index counts row by row.
  template <typename Function>
  void for_each(Function function) const {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t k = 0; k < stride - 1; ++k) {
        for (uint64_t rest = words[row(y) + k]; rest; rest &= rest - 1) {
          function(y * width + 64 * k + __builtin_ctzll(rest));
        }
      }
    }
  }

  int64_t count() const {
    int64_t n = 0;
    for (const uint64_t word : words) n += __builtin_popcountll(word);
    return n;
  }
};

}  // namespace taskgroup
