#include "ops/cpu/combine.h"

#include <algorithm>
#include <vector>

#include "ops/cpu/gradient_reader.h"
#include "ops/cpu/parts.h"

namespace taskgroup {

namespace {

constexpr int64_t kLeastPart = 16384;  // elements, worth a thread
constexpr int64_t kMostParts = 4096;

template <typename T>
class Combiner {
 public:
  Combiner(const Gradients& gradients, const double* weights, const GradientLoops& loops)
      : gradients_(gradients),
        weights_(weights),
        loops_(loops),
        chunk_(gradients.n_tasks <= 64 ? 1024 : 128),
        reader_(loops, chunk_) {}

  void add(const Parameter& parameter, const Output& output, int64_t begin, int64_t end) {
    const int64_t count = parameter.end - parameter.begin;
    rows_.resize(count);
    some_weights_.resize(count);
    for (int64_t r = 0; r < count; ++r) {
      some_weights_[r] = static_cast<T>(weights_[gradients_.all[parameter.begin + r].task]);
    }
    if (GradientReader<T>::in_place(parameter)) {
      const int64_t whole = (end - begin) / lanes() * lanes();
      for (int64_t r = 0; r < count; ++r) {
        rows_[r] = static_cast<const T*>(gradients_.all[parameter.begin + r].data) + begin;
      }
      run(whole, static_cast<T*>(output.data) + begin);
      begin += whole;
    }
    // Of other types or strides, or the last few: through a buffer.
    for (; begin < end; begin += chunk_) {
      const int64_t n = std::min(chunk_, end - begin);
      buffer_.resize((count + 1) * chunk_);
      T* result = buffer_.data() + count * chunk_;
      for (int64_t r = 0; r < count; ++r) {
        T* row = buffer_.data() + r * chunk_;
        reader_.copy(parameter, gradients_.all[parameter.begin + r], begin, n, row);
        rows_[r] = row;
      }
      run((n + lanes() - 1) / lanes() * lanes(), result);  // what lies behind n is never looked at
      write(parameter, output, begin, n, result);
    }
  }

 private:
  int64_t lanes() const { return std::is_same_v<T, float> ? loops_.lanes : loops_.double_lanes; }

  void run(int64_t n, T* out) {
    const auto count = static_cast<int32_t>(rows_.size());
    if constexpr (std::is_same_v<T, float>) {
      loops_.combine_float(rows_.data(), some_weights_.data(), count, n, out);
    } else {
      loops_.combine_double(rows_.data(), some_weights_.data(), count, n, out);
    }
  }

  void write(const Parameter& parameter, const Output& output, int64_t begin, int64_t n,
             const T* result) {
    if constexpr (std::is_same_v<T, float>) {
      if (parameter.dtype != Dtype::kFloat) {
        raw_.resize(chunk_);
        (parameter.dtype == Dtype::kHalf ? loops_.narrow_half : loops_.narrow_bfloat16)(
            result, n, raw_.data());
        scatter(parameter, output, begin, n, raw_.data());
        return;
      }
    }
    scatter(parameter, output, begin, n, result);
  }

  template <typename raw_t>
  static void scatter(const Parameter& parameter, const Output& output, int64_t begin, int64_t n,
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
  const GradientLoops& loops_;
  const int64_t chunk_;
  GradientReader<T> reader_;
  std::vector<const T*> rows_;
  std::vector<T> some_weights_, buffer_;
  std::vector<uint16_t> raw_;
};

}  // namespace

void combine(const Gradients& gradients, const double* weights, const std::vector<Output>& outputs,
             const GradientLoops& loops, const ParallelFor& parallel_for) {
  const Parts parts(gradients.parameters, kLeastPart, kMostParts);
  parallel_for(parts.count(), [&](int64_t first, int64_t last) {
    Combiner<float> floats(gradients, weights, loops);
    Combiner<double> doubles(gradients, weights, loops);
    for (int64_t part = first; part < last; ++part) {
      parts.for_each_piece(part, [&](size_t t, int64_t begin, int64_t end) {
        const Parameter& parameter = gradients.parameters[t];
        if (parameter.dtype == Dtype::kDouble) {
          doubles.add(parameter, outputs[t], begin, end);
        } else {
          floats.add(parameter, outputs[t], begin, end);
        }
      });
    }
  });
}

}  // namespace taskgroup
