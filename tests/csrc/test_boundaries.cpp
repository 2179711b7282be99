#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "check.h"
#include "host/bitmap.h"
#include "host/boundary_matching.h"
#include "host/thinning.h"

// Tests thinning against the conditions of the paper, pixel by pixel, and matching against a search
// for augmenting paths over a list of all pairs.

using namespace taskgroup;

namespace {

struct Image {
  int64_t H, W;
  std::vector<uint8_t> pixels;  // [H, W], 0 or 1

  int at(int64_t y, int64_t x) const {
    return y >= 0 && y < H && x >= 0 && x < W ? pixels[y * W + x] : 0;
  }
};

Image thin_by_words(const Image& image) {
  Bitmap bitmap(image.H, image.W);
  bitmap.assign([&](int64_t pixel) { return image.pixels[pixel] != 0; });
  thin(bitmap);
  Image result{image.H, image.W, std::vector<uint8_t>(image.H * image.W)};
  bitmap.for_each([&](int64_t pixel) { result.pixels[pixel] = 1; });
  int64_t n = 0;
  for (const uint8_t pixel : result.pixels) n += pixel;
  CHECK(bitmap.count() == n);
  return result;
}

bool is_removed(const Image& image, int64_t y, int64_t x, bool second) {
  const int p[] = {image.at(y, x + 1),     image.at(y - 1, x + 1), image.at(y - 1, x),
                   image.at(y - 1, x - 1), image.at(y, x - 1),     image.at(y + 1, x - 1),
                   image.at(y + 1, x),     image.at(y + 1, x + 1)};
  int runs = 0, n1 = 0, n2 = 0;
  for (int i = 0; i < 8; i += 2) {
    runs += !p[i] && (p[i + 1] || p[(i + 2) % 8]);
    n1 += p[i + 1] || p[i];
    n2 += p[i + 1] || p[(i + 2) % 8];
  }
  const int n = std::min(n1, n2);
  const bool keeps = second ? (p[5] || p[6] || !p[3]) && p[4] : (p[1] || p[2] || !p[7]) && p[0];
  return image.at(y, x) && runs == 1 && (n == 2 || n == 3) && !keeps;
}

Image thin_by_pixels(Image image) {
  for (bool changed = true; changed;) {
    changed = false;
    for (const bool second : {false, true}) {
      const Image before = image;
      for (int64_t y = 0; y < image.H; ++y) {
        for (int64_t x = 0; x < image.W; ++x) {
          if (!is_removed(before, y, x, second)) continue;
          image.pixels[y * image.W + x] = 0;
          changed = true;
        }
      }
    }
  }
  return image;
}

int64_t match_by_pairs(const Image& one, const Image& other, double distance) {
  const int64_t n = one.H * one.W;
  std::vector<int64_t> partner(n, -1);
  std::vector<bool> seen;
  const std::function<bool(int64_t)> finds_partner = [&](int64_t a) {
    for (int64_t b = 0; b < n; ++b) {
      const double far = std::hypot(a / one.W - b / one.W, a % one.W - b % one.W);
      if (!other.pixels[b] || seen[b] || far > distance) continue;
      seen[b] = true;
      if (partner[b] < 0 || finds_partner(partner[b])) {
        partner[b] = a;
        return true;
      }
    }
    return false;
  };
  int64_t matched = 0;
  for (int64_t a = 0; a < n; ++a) {
    seen.assign(n, false);
    matched += one.pixels[a] && finds_partner(a);
  }
  return matched;
}

// Discs and dots on a share of the pixels.
Image random_image(std::mt19937& random, int64_t H, int64_t W, int discs) {
  Image image{H, W, std::vector<uint8_t>(H * W)};
  for (int disc = 0; disc < discs; ++disc) {
    const int64_t y0 = random() % H, x0 = random() % W, radius = random() % 7;
    for (int64_t y = 0; y < H; ++y) {
      for (int64_t x = 0; x < W; ++x) {
        const int64_t squared = (y - y0) * (y - y0) + (x - x0) * (x - x0);
        if (squared <= radius * radius) image.pixels[y * W + x] = 1;
      }
    }
  }
  return image;
}

void test_thinning(std::mt19937& random) {
  for (const int64_t W : {1, 5, 63, 64, 65, 128, 131}) {
    for (const int discs : {0, 3, 12, 60}) {
      const Image image = random_image(random, 29, W, discs);
      CHECK(thin_by_words(image).pixels == thin_by_pixels(image).pixels);
    }
    const Image all{29, W, std::vector<uint8_t>(29 * W, 1)};
    CHECK(thin_by_words(all).pixels == thin_by_pixels(all).pixels);
  }
}

void test_matching(std::mt19937& random) {
  for (const int64_t W : {1, 9, 64, 70}) {
    for (const double distance : {0.0, 1.0, 1.5, 3.7, 100.0, HUGE_VAL}) {
      const Image one = thin_by_pixels(random_image(random, 8, W, 6));
      const Image other = thin_by_pixels(random_image(random, 8, W, 4));
      const int64_t matched = match_by_pairs(one, other, distance);
      CHECK(match_boundaries(one.pixels.data(), other.pixels.data(), 8, W, distance) == matched);
      CHECK(match_boundaries(other.pixels.data(), one.pixels.data(), 8, W, distance) == matched);
    }
  }
}

void test_counts(std::mt19937& random) {
  const int64_t H = 20, W = 70, n = 7;
  Image reached{H, W, std::vector<uint8_t>(H * W)};
  for (int k = 0; k < 7; ++k) {
    if (k == 3) continue;  // one map is that of the threshold before
    const Image more = random_image(random, H, W, 4);
    for (int64_t i = 0; i < H * W; ++i) reached.pixels[i] += more.pixels[i];
  }
  const Image known{H, W, std::vector<uint8_t>(H * W, 1)};
  Image label = thin_by_pixels(random_image(random, H, W, 8)), seen = known;
  for (int64_t i = 0; i < H * W; i += 11) seen.pixels[i] = label.pixels[i] = 0;
  std::vector<int64_t> counts(3 * n);
  count_boundaries(reached.pixels.data(), label.pixels.data(), seen.pixels.data(), H, W, 2.5, n,
                   counts.data());
  for (int64_t k = 0; k < n; ++k) {
    Image map = reached;
    for (uint8_t& pixel : map.pixels) pixel = pixel > k;
    map = thin_by_pixels(map);
    int64_t predicted = 0, labelled = 0;
    for (int64_t i = 0; i < H * W; ++i) {
      map.pixels[i] &= seen.pixels[i];
      predicted += map.pixels[i];
      labelled += label.pixels[i];
    }
    CHECK(counts[k] == match_by_pairs(map, label, 2.5));
    CHECK(counts[n + k] == predicted);
    CHECK(counts[2 * n + k] == labelled);
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  test_thinning(random);
  test_matching(random);
  for (int repeat = 0; repeat < 5; ++repeat) test_counts(random);
}
