#include "host/thinning.h"

namespace taskgroup {

namespace {

// True for the pixels of a word that a pass removes if they are set. `at` points to the word.
// The neighbours are p0 to p7, counterclockwise from the right.
template <bool second>
uint64_t removable(const uint64_t* at, int64_t stride) {
  const uint64_t *up = at - stride, *down = at + stride;
  const auto left = [](const uint64_t* w) { return w[0] << 1 | w[-1] >> 63; };
  const auto right = [](const uint64_t* w) { return w[0] >> 1 | w[1] << 63; };
  const uint64_t p0 = right(at), p1 = right(up), p2 = *up, p3 = left(up);
  const uint64_t p4 = left(at), p5 = left(down), p6 = *down, p7 = right(down);

  // Exactly one of four: the pixel joins its neighbours to no others.
  const uint64_t a = ~p0 & (p1 | p2), b = ~p2 & (p3 | p4);
  const uint64_t c = ~p4 & (p5 | p6), d = ~p6 & (p7 | p0);
  const uint64_t one_run = (a ^ b ^ c ^ d) & ~(a & b) & ~(c & d);

  // Two or three pairs of neighbours, for the smaller of the two ways to pair them: the pixel is
  // neither the end of a line nor inside a region.
  const uint64_t e = p1 | p0, f = p3 | p2, g = p5 | p4, h = p7 | p6;
  const uint64_t i = p1 | p2, j = p3 | p4, k = p5 | p6, l = p7 | p0;
  const uint64_t least =
      ((e & f) | (g & h) | ((e | f) & (g | h))) & ((i & j) | (k & l) | ((i | j) & (k | l)));
  const uint64_t at_border = least & ~(e & f & g & h & i & j & k & l);

  // The two passes remove pixels at opposite sides.
  const uint64_t keeps = second ? (p5 | p6 | ~p3) & p4 : (p1 | p2 | ~p7) & p0;
  return one_run & at_border & ~keeps;
}

struct Removal {
  int64_t word;
  uint64_t pixels;
};

// Removes pixels from the words at `looked_at`, all at the same time, and lists the words that
// change.
template <bool second>
void pass(Bitmap& image, const std::vector<int64_t>& looked_at, std::vector<Removal>& removed) {
  removed.clear();
  uint64_t* words = image.words.data();
  for (const int64_t word : looked_at) {
    const uint64_t pixels = words[word] & removable<second>(words + word, image.stride);
    if (pixels) removed.push_back({word, pixels});
  }
  for (const Removal& removal : removed) words[removal.word] &= ~removal.pixels;
}

}  // namespace

void thin(Bitmap& image) {
  const int64_t stride = image.stride;
  std::vector<int64_t> looked_at;
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t word = image.row(y); word < image.row(y) + stride - 1; ++word) {
      if (image.words[word]) looked_at.push_back(word);
    }
  }
  // A pass removes nothing from a word if nothing has changed around the word since the last pass
  // of the same kind looked at it, which is two passes ago.
  const std::vector<int64_t> all = looked_at;
  std::vector<Removal> first, second;
  std::vector<int64_t> listed(image.words.size(), -1);  // the pass for which a word was listed last
  int64_t passes = 0;
  const auto list_neighbours = [&](const std::vector<Removal>& removed) {
    for (const Removal& removal : removed) {
      for (int64_t row = removal.word - stride; row <= removal.word + stride; row += stride) {
        for (int64_t word = row - 1; word <= row + 1; ++word) {
          if (listed[word] == passes || !image.words[word]) continue;
          listed[word] = passes;
          looked_at.push_back(word);
        }
      }
    }
  };
  const auto list = [&] {
    looked_at.clear();
    ++passes;
    list_neighbours(first);
    list_neighbours(second);
  };
  pass<false>(image, all, first);
  pass<true>(image, all, second);
  while (!first.empty() || !second.empty()) {
    list();
    pass<false>(image, looked_at, first);
    list();
    pass<true>(image, looked_at, second);
  }
}

}  // namespace taskgroup
