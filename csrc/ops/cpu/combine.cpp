#include "ops/cpu/combine.h"

#include <algorithm>
#include <vector>

#include "ops/cpu/parts.h"
#include "ops/cpu/strided.h"

namespace taskgroup {

namespace {

constexpr int64_t kLeastPart = 16384;  // the fewest elements that are worth a thread
constexpr int64_t kMostParts = 4096;

// Combines gradients that are stored as raw_t and summed as T.
template <typename raw_t, typename T>
class Combiner {
 public:
  using Loop = void (*)(const raw_t* const*, const T*, int32_t, int64_t, raw_t*);

  Combiner(const Gradients& gradients, const double* weights, Loop loop, int64_t lanes)
      : gradients_(gradients), weights_(weights), loop_(loop), lanes_(lanes) {}

  void add(const Parameter& parameter, const Output& output, int64_t begin, int64_t end) {
    const int64_t count = parameter.end - parameter.begin;
    rows_.resize(count);
    some_weights_.resize(count);
    for (int64_t r = 0; r < count; ++r) {
      some_weights_[r] = static_cast<T>(weights_[gradients_.all[parameter.begin + r].task]);
    }
    if (!parameter.strided) {
      for (int64_t r = 0; r < count; ++r) {
        rows_[r] = static_cast<const raw_t*>(gradients_.all[parameter.begin + r].data) + begin;
      }
      const int64_t whole = (end - begin) / lanes_ * lanes_;
      run(whole, static_cast<raw_t*>(output.data) + begin);
      begin += whole;
    }
    // Gradients with other strides, and the last few elements, are copied to a buffer.
    for (; begin < end; begin += kChunk) {
      const int64_t n = std::min(kChunk, end - begin);
      buffer_.resize((count + 1) * kChunk);
      raw_t* result = buffer_.data() + count * kChunk;
      for (int64_t r = 0; r < count; ++r) {
        raw_t* row = buffer_.data() + r * kChunk;
        copy_elements(parameter, gradients_.all[parameter.begin + r], begin, n, row);
        rows_[r] = row;
      }
      run((n + lanes_ - 1) / lanes_ * lanes_, result);  // elements past n are not used
      write(parameter, output, begin, n, result);
    }
  }

 private:
  static constexpr int64_t kChunk = 256;

  void run(int64_t n, raw_t* out) {
    loop_(rows_.data(), some_weights_.data(), static_cast<int32_t>(rows_.size()), n, out);
  }

  static void write(const Parameter& parameter, const Output& output, int64_t begin, int64_t n,
                    const raw_t* from) {
    auto* data = static_cast<raw_t*>(output.data);
    if (!parameter.strided) {
      std::copy(from, from + n, data + begin);
      return;
    }
    for_each_run(parameter.sizes, output.strides, parameter.dim, begin, n,
                 [&](int64_t offset, int64_t stride, int64_t count) {
                   for (int64_t x = 0; x < count; ++x) data[offset + x * stride] = *from++;
                 });
  }

  const Gradients& gradients_;
  const double* weights_;
  const Loop loop_;
  const int64_t lanes_;
  std::vector<const raw_t*> rows_;
  std::vector<T> some_weights_;
  std::vector<raw_t> buffer_;
};

}  // namespace

void combine(const Gradients& gradients, const double* weights, const std::vector<Output>& outputs,
             const GradientLoops& loops, const ParallelFor& parallel_for) {
  const Parts parts(gradients.parameters, kLeastPart, kMostParts);
  parallel_for(parts.count(), [&](int64_t first, int64_t last) {
    Combiner<float, float> floats(gradients, weights, loops.combine_float, loops.lanes);
    Combiner<double, double> doubles(gradients, weights, loops.combine_double, loops.double_lanes);
    Combiner<uint16_t, float> brains(gradients, weights, loops.combine_bfloat16, loops.lanes);
    Combiner<uint16_t, float> halves(gradients, weights, loops.combine_half, loops.lanes);
    for (int64_t part = first; part < last; ++part) {
      parts.for_each_piece(part, [&](size_t t, int64_t begin, int64_t end) {
        const Parameter& parameter = gradients.parameters[t];
        switch (parameter.dtype) {
          case Dtype::kFloat:
            return floats.add(parameter, outputs[t], begin, end);
          case Dtype::kDouble:
            return doubles.add(parameter, outputs[t], begin, end);
          case Dtype::kBFloat16:
            return brains.add(parameter, outputs[t], begin, end);
          case Dtype::kHalf:
            return halves.add(parameter, outputs[t], begin, end);
        }
      });
    }
  });
}

}  // namespace taskgroup
