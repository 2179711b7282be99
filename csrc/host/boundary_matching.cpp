#include "host/boundary_matching.h"

#include <algorithm>
#include <vector>

#include "host/bitmap.h"
#include "host/thinning.h"

namespace taskgroup {

namespace {

constexpr int32_t kNone = -1;

// A disc around a pixel: for row offsets -radius to radius, the number of columns to either side.
struct Disc {
  int64_t radius;
  std::vector<int64_t> half;  // [radius + 1], by the size of the offset

  Disc(double distance, int64_t longest)
      : radius(static_cast<int64_t>(std::min(distance, static_cast<double>(longest)))),
        half(radius + 1) {
    const double squared = distance * distance;
    for (int64_t dy = 0; dy <= radius; ++dy) {
      int64_t dx = 0;
      while (dx < radius && static_cast<double>(dy * dy + (dx + 1) * (dx + 1)) <= squared) ++dx;
      half[dy] = dx;
    }
  }
};

struct Map {
  Bitmap pixels;
  std::vector<int32_t> partner;  // [H * W] index of the matched pixel in the other map, or kNone

  Map(int64_t H, int64_t W) : pixels(H, W), partner(H * W, kNone) {}
};

// Searches for augmenting paths between two maps.
class Matcher {
 public:
  Matcher(int64_t H, int64_t W, double distance)
      : disc_(distance, std::max(H, W)), unseen_(H, W), parent_(H * W), root_(H * W) {}

  // Makes a matching of two maps a maximum one, and returns the number of pairs added.
  int64_t complete(Map& one, Map& other) {
    int64_t added = 0;
    while (const int64_t more = phase(one, other)) added += more;
    return added;
  }

 private:
  // Grows a tree of alternating paths from each pixel of `from` without a partner, breadth first
  // and each pixel of `to` in one tree alone. Ends a tree at the first pixel without a partner, and
  // matches along the path to it. Returns 0 only if there is no augmenting path.
  int64_t phase(Map& from, Map& to) {
    int64_t added = 0;
    unseen_.words = to.pixels.words;
    queue_.clear();
    from.pixels.for_each([&](int64_t pixel) {
      if (from.partner[pixel] != kNone) return;
      root_[pixel] = static_cast<int32_t>(pixel);
      queue_.push_back(static_cast<int32_t>(pixel));
    });
    for (size_t head = 0; head < queue_.size(); ++head) {
      const int32_t pixel = queue_[head];
      const int32_t root = root_[pixel];
      if (from.partner[root] != kNone) continue;  // the tree has ended
      const int32_t end = look_around(pixel, root, to);
      if (end == kNone) continue;
      for (int32_t other = end; other != kNone;) {
        const int32_t mine = parent_[other];
        to.partner[other] = mine;
        std::swap(from.partner[mine], other);
      }
      ++added;
    }
    return added;
  }

  // Adds the pixels of `to` in the disc to the tree. Returns one without a partner, or kNone.
  int32_t look_around(int32_t pixel, int32_t root, const Map& to) {
    const int64_t H = unseen_.height, W = unseen_.width, y = pixel / W, x = pixel % W;
    const int64_t top = std::max<int64_t>(y - disc_.radius, 0);
    const int64_t bottom = std::min(y + disc_.radius, H - 1);
    for (int64_t row = top; row <= bottom; ++row) {
      const int64_t half = disc_.half[row < y ? y - row : row - y];
      const int64_t left = std::max<int64_t>(x - half, 0), right = std::min(x + half, W - 1);
      uint64_t* words = &unseen_.words[unseen_.row(row)];
      for (int64_t k = left / 64; k <= right / 64; ++k) {
        uint64_t found = words[k];
        if (k == left / 64) found &= ~uint64_t{0} << left % 64;
        if (k == right / 64) found &= ~uint64_t{0} >> (63 - right % 64);
        words[k] &= ~found;
        for (; found; found &= found - 1) {
          const auto other = static_cast<int32_t>(row * W + 64 * k + __builtin_ctzll(found));
          parent_[other] = pixel;
          const int32_t next = to.partner[other];
          if (next == kNone) {
            words[k] |= found & (found - 1);  // the rest has not been seen
            return other;
          }
          root_[next] = root;
          queue_.push_back(next);
        }
      }
    }
    return kNone;
  }

  Disc disc_;
  Bitmap unseen_;                // the pixels of `to` that are in no tree yet
  std::vector<int32_t> parent_;  // [H * W] for a pixel of `to`, the pixel it was found from
  std::vector<int32_t> root_;    // [H * W] for a pixel of `from`, the root of its tree
  std::vector<int32_t> queue_;   // pixels of `from`
};

}  // namespace

int64_t match_boundaries(const uint8_t* one, const uint8_t* other, int64_t H, int64_t W,
                         double distance) {
  Map few(H, W), many(H, W);
  few.pixels.assign([&](int64_t pixel) { return one[pixel] != 0; });
  many.pixels.assign([&](int64_t pixel) { return other[pixel] != 0; });
  if (few.pixels.count() > many.pixels.count()) std::swap(few, many);
  return Matcher(H, W, distance).complete(few, many);
}

void count_boundaries(const uint8_t* reached, const uint8_t* label, const uint8_t* known, int64_t H,
                      int64_t W, double distance, int64_t n, int64_t* counts) {
  std::vector<bool> new_map(256,
                            false);  // whether the map differs from that of the threshold before
  new_map[0] = true;
  for (int64_t pixel = 0; pixel < H * W; ++pixel) new_map[reached[pixel]] = true;
  Bitmap seen(H, W);
  seen.assign([&](int64_t pixel) { return known[pixel] != 0; });
  Map labelled(H, W), predicted(H, W);
  labelled.pixels.assign([&](int64_t pixel) { return label[pixel] != 0; });
  const int64_t n_labelled = labelled.pixels.count();
  Matcher matcher(H, W, distance);
  int64_t n_predicted = 0, n_matched = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (new_map[k]) {
      Bitmap& map = predicted.pixels;
      map.assign([&](int64_t pixel) { return reached[pixel] > k; });
      thin(map);
      for (size_t word = 0; word < map.words.size(); ++word) map.words[word] &= seen.words[word];
      n_predicted = map.count();
      // Most pixels are still predicted: keep their partners, and complete the matching.
      n_matched = 0;
      std::fill(predicted.partner.begin(), predicted.partner.end(), kNone);
      labelled.pixels.for_each([&](int64_t pixel) {
        int32_t& partner = labelled.partner[pixel];
        if (partner == kNone) return;
        if (map(partner / W, partner % W)) {
          predicted.partner[partner] = static_cast<int32_t>(pixel);
          ++n_matched;
        } else {
          partner = kNone;
        }
      });
      n_matched += n_predicted < n_labelled ? matcher.complete(predicted, labelled)
                                            : matcher.complete(labelled, predicted);
    }
    counts[k] = n_matched;
    counts[n + k] = n_predicted;
    counts[2 * n + k] = n_labelled;
  }
}

}  // namespace taskgroup
