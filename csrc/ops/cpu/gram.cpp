#include "ops/cpu/gram.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "ops/cpu/parts.h"
#include "ops/cpu/strided.h"

namespace taskgroup {

namespace {

constexpr int64_t kBlock = 64;  // tasks in a block, whose sums and one chunk fit into the L2 cache
constexpr int64_t kLeastPart = 32768;  // the fewest elements that are worth a thread
constexpr int64_t kFewRows = 16;       // up to which one tile of AMX is slower than plain products
constexpr int64_t kMostParts = 256;    // bounds the memory of the partial sums

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The rows of one block of tasks in one chunk.
template <typename T>
struct Rows {
  std::vector<int64_t> gradients;  // positions in Gradients::all
  std::vector<int32_t> places;     // index of each task in its block
  std::vector<const T*> data;

  void select(const Gradients& all, const Parameter& parameter, int64_t first_task) {
    gradients.clear();
    places.clear();
    for (int64_t i = parameter.begin; i < parameter.end; ++i) {
      const int64_t place = all.all[i].task - first_task;
      if (place < 0 || place >= kBlock) continue;
      gradients.push_back(i);
      places.push_back(static_cast<int32_t>(place));
    }
    data.resize(gradients.size());
  }

  GramRows<T> view() const {
    return {data.data(), places.data(), static_cast<int32_t>(places.size())};
  }
};

// Adds the products of the tasks of two blocks to `sums`, over pieces of parameters.
template <typename T>
class BlockGram {
 public:
  // `pairs` are further sums, of tile_gram_bfloat16.
  BlockGram(const Gradients& gradients, const GradientLoops& loops, int64_t a, int64_t b,
            int64_t ld, double* sums, double* pairs = nullptr)
      : gradients_(gradients),
        loops_(loops),
        a_(a),
        b_(b),
        ld_(ld),
        lanes_(std::is_same_v<T, double>  ? loops.double_lanes
               : std::is_same_v<T, float> ? loops.lanes
                                          : 2 * loops.lanes),
        chunk_(gram_chunk<T>(lanes_)),
        sums_(sums),
        pairs_(pairs) {}

  void add(const Parameter& parameter, int64_t begin, int64_t end) {
    left_.select(gradients_, parameter, a_ * kBlock);
    if (a_ != b_) right_.select(gradients_, parameter, b_ * kBlock);
    if (left_.gradients.empty() || (a_ != b_ && right_.gradients.empty())) return;
    const bool in_place = !parameter.strided && size_of(parameter.dtype) == sizeof(T);
    for (int64_t x = begin; x < end;) {
      const int64_t n = std::min(chunk_, end - x);
      const int64_t whole = n / lanes_ * lanes_;
      if (in_place && whole > 0) {
        point(left_, x);
        if (a_ != b_) point(right_, x);
        run(whole, end - x > whole);
        x += whole;
      } else {
        // Gradients of another type, other strides, and the last few elements are copied to a
        // buffer, padded with zeros.
        const int64_t padded = round_up(n, lanes_);
        T* end_of_left = copy_rows(parameter, left_, x, n, padded, 0);
        if (a_ != b_) copy_rows(parameter, right_, x, n, padded, end_of_left - buffer_.data());
        run(padded, false);
        x += n;
      }
    }
  }

 private:
  void point(Rows<T>& rows, int64_t x) {
    for (size_t r = 0; r < rows.data.size(); ++r) {
      rows.data[r] = static_cast<const T*>(gradients_.all[rows.gradients[r]].data) + x;
    }
  }

  // Copies the rows to the buffer, after its first `used` elements. Returns the new end.
  T* copy_rows(const Parameter& parameter, Rows<T>& rows, int64_t x, int64_t n, int64_t padded,
               int64_t used) {
    if (buffer_.empty()) buffer_.resize(2 * ld_ * chunk_);
    T* to = buffer_.data() + used;
    for (size_t r = 0; r < rows.data.size(); ++r) {
      copy(parameter, gradients_.all[rows.gradients[r]], x, n, to);
      std::fill(to + n, to + padded, T(0));
      rows.data[r] = to;
      to += padded;
    }
    return to;
  }

  // Copies elements and converts them to T.
  void copy(const Parameter& parameter, const Gradient& gradient, int64_t x, int64_t n, T* to) {
    if constexpr (std::is_same_v<T, float>) {
      if (parameter.dtype != Dtype::kFloat) {
        const auto* raw = static_cast<const uint16_t*>(gradient.data) + x;
        if (parameter.strided) {
          raw_.resize(chunk_);
          copy_elements(parameter, gradient, x, n, raw_.data());
          raw = raw_.data();
        }
        (parameter.dtype == Dtype::kHalf ? loops_.widen_half : loops_.widen_bfloat16)(raw, n, to);
        return;
      }
    }
    copy_elements(parameter, gradient, x, n, to);
  }

  void run(int64_t n, bool prefetch) {
    const GramRows<T> left = left_.view(), right = right_.view();
    const GramRows<T>* other = a_ == b_ ? nullptr : &right;
    if constexpr (std::is_same_v<T, float>) {
      loops_.gram_float(left, other, n, sums_, ld_, prefetch);
    } else if constexpr (std::is_same_v<T, double>) {
      loops_.gram_double(left, other, n, sums_, ld_, prefetch);
    } else if (loops_.tile_gram_bfloat16 != nullptr && left.count > kFewRows) {
      if (!scratch_) scratch_ = std::make_unique<TileScratch>();
      loops_.tile_gram_bfloat16(left, other, n, pairs_, *scratch_, prefetch);
    } else {
      loops_.gram_bfloat16(left, other, n, sums_, ld_, prefetch);
    }
  }

  const Gradients& gradients_;
  const GradientLoops& loops_;
  const int64_t a_, b_, ld_, lanes_, chunk_;
  double* sums_;
  double* pairs_;
  Rows<T> left_, right_;
  std::vector<uint16_t> raw_;
  std::vector<T> buffer_;
  std::unique_ptr<TileScratch> scratch_;
};

}  // namespace

void gram(const Gradients& gradients, const GradientLoops& loops, const ParallelFor& parallel_for,
          const std::function<void(int64_t, int64_t, double)>& result) {
  const int64_t K = gradients.n_tasks;
  const int64_t lanes = loops.double_lanes;
  const Parts parts(gradients.parameters, kLeastPart, kMostParts);
  const int64_t ld = std::min(K, kBlock);
  std::vector<double> partial(parts.count() * ld * ld);
  for (int64_t a = 0; a * kBlock < K; ++a) {
    for (int64_t b = a; b * kBlock < K; ++b) {
      parallel_for(parts.count(), [&](int64_t first, int64_t last) {
        std::vector<double> sums(ld * ld * lanes);
        std::vector<double> pairs(loops.tile_gram_bfloat16 != nullptr ? kBlock * kBlock : 0);
        BlockGram<float> floats(gradients, loops, a, b, ld, sums.data());
        BlockGram<double> doubles(gradients, loops, a, b, ld, sums.data());
        BlockGram<uint16_t> brains(gradients, loops, a, b, ld, sums.data(), pairs.data());
        for (int64_t p = first; p < last; ++p) {
          std::fill(sums.begin(), sums.end(), 0.0);
          std::fill(pairs.begin(), pairs.end(), 0.0);
          parts.for_each_piece(p, [&](size_t t, int64_t begin, int64_t end) {
            const Parameter& parameter = gradients.parameters[t];
            if (parameter.dtype == Dtype::kDouble) {
              doubles.add(parameter, begin, end);
            } else if (parameter.dtype == Dtype::kBFloat16 && loops.gram_bfloat16 != nullptr) {
              brains.add(parameter, begin, end);
            } else {
              floats.add(parameter, begin, end);
            }
          });
          for (int64_t pair = 0; pair < ld * ld; ++pair) {
            double sum = pairs.empty() ? 0 : pairs[pair / ld * kBlock + pair % ld];
            for (int64_t lane = 0; lane < lanes; ++lane) sum += sums[pair * lanes + lane];
            partial[p * ld * ld + pair] = sum;
          }
        }
      });
      for (int64_t i = 0; i < std::min(kBlock, K - a * kBlock); ++i) {
        for (int64_t j = a == b ? i : 0; j < std::min(kBlock, K - b * kBlock); ++j) {
          double sum = 0;
          for (int64_t p = 0; p < parts.count(); ++p) sum += partial[(p * ld + i) * ld + j];
          result(a * kBlock + i, b * kBlock + j, sum);
        }
      }
    }
  }
}

}  // namespace taskgroup
