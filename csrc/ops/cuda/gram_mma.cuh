#pragma once

// Inner products of up to 64 tasks on the tensor cores.
//
// The order of the terms of an inner product does not matter, so each lane loads columns in the
// order of memory. Let g = lane / 4 and t = lane % 4. From every group of 8 rows, a lane loads the
// t-th piece of 16 bytes of row g. Its registers for groups 2i and 2i+1 are then its fragment of
// the i-th left operand [16, 16], and its registers for group j are its fragment of the j-th right
// operand [16, 8]. Both operands use the same registers, and nothing passes through shared memory.

#include "ops/cuda/gram_table.cuh"

namespace taskgroup {

// The words that a lane holds of a group of 8 rows and 16 columns. Each number is the sum of kParts
// terms.
template <typename T>
struct Fragment {
  static constexpr int kParts = 1, kProducts = 1;
  uint32_t word[1][2];
};

// A float is exactly the sum of three bfloat16 numbers. The product of two such sums has nine
// terms. The six largest are computed; the other three are below 2^-25 of the product. With two
// bfloat16 numbers per float and three terms, the error for a gradient of equal numbers would be
// 8e-6.
template <>
struct Fragment<float> {
  static constexpr int kParts = 3, kProducts = 6;
  uint32_t word[3][2];
};

// The indices of the left and the right term of a product. Small products are added first.
struct Product {
  int left, right;
};

template <typename T>
__device__ constexpr Product product_of_parts(int n) {
  return Fragment<T>::kParts == 1 ? Product{0, 0}
         : n == 0                 ? Product{1, 1}
         : n == 1                 ? Product{0, 2}
         : n == 2                 ? Product{2, 0}
         : n == 3                 ? Product{0, 1}
         : n == 4                 ? Product{1, 0}
                                  : Product{0, 0};
}

// The fragment for step s. The 16 bytes of a lane hold kPerVector<T> / 4 steps.
template <typename T>
__device__ inline Fragment<T> fragment(const Words& v, int s) {
  Fragment<T> f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (sizeof(T) == 2) {
      f.word[0][h] = v.word[2 * s + h];
    } else {
      float low = bits_as<float>(v.word[2 * h]), high = bits_as<float>(v.word[2 * h + 1]);
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        const uint32_t pair = narrow_bfloat16_pair(low, high);
        f.word[p][h] = pair;
        low -= bits_as<float>(pair << 16);
        high -= bits_as<float>(pair & 0xffff0000u);
      }
    }
  }
  return f;
}

__device__ inline void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                           const uint32_t (&b)[2]) {
  mma_bfloat16(d, a, b);
}
__device__ inline void mma(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_bfloat16(d, a, b);
}
__device__ inline void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_half(d, a, b);
}

// The inner products of 8 kLeft tasks with each other (kTriangle, kLeft == kRight), or with 8
// kRight other tasks.
template <typename T_, int kLeft_, int kRight_, bool kTriangle_, int kWarps_>
struct GramMma {
  using T = T_;
  static constexpr int kLeft = kLeft_, kRight = kRight_, kWarps = kWarps_;  // kLeft is even
  static constexpr bool kTriangle = kTriangle_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kLeftTiles = kLeft / 2;
  // The number of 16 x 8 tiles. A triangle has only the tiles with entries on or above the
  // diagonal.
  static constexpr int kTiles =
      kTriangle ? kLeftTiles * (kRight - kLeftTiles + 1) : kLeftTiles * kRight;
  static constexpr int kSums = 4 * kTiles;          // per lane
  static constexpr int kUnit = 256 / sizeof(T);     // columns after which sums go to float64
  static constexpr int kTile = kWarps * kUnit;      // one unit per warp
  static constexpr int kWidth = 4 * kPerVector<T>;  // columns in one load of a warp
  // How much is loaded at once. With few rows more columns are loaded, to keep enough loads in
  // flight.
  static constexpr int kRows = kTriangle ? kLeft : kLeft + kRight;
  static constexpr int kLoads = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;  // per row
  static constexpr int kPiece = kLoads * kWidth, kPieces = kUnit / kPiece;
  // The number of tiles that are computed together, so that consecutive products are independent.
  static constexpr int kBeside = Fragment<T>::kProducts > 1 ? 4 : 2;
  // The number of blocks per multiprocessor; the registers for the sums limit it.
  static constexpr int kBlocks = kRows <= 2 ? 4 : kSums <= 32 ? 3 : 2;
  static constexpr size_t kSumBytes = kWarps * kSums * 32 * sizeof(double);
  static constexpr size_t kSharedBytes = kSumBytes + kWarps * 8 * kRows * sizeof(T*);

  // The first right tile beside left tile i.
  static __device__ constexpr int first_right(int i) { return kTriangle ? 2 * i : 0; }
};

// The row and the column of a lane's s-th sum.
struct Place {
  int row, column;
};

template <typename G>
__device__ inline Place place_of_sum(int s, int lane) {
  int i = 0, j = s / 4;
  while (j >= G::kRight - G::first_right(i)) {
    j -= G::kRight - G::first_right(i);
    ++i;
  }
  j += G::first_right(i);
  return {16 * i + lane / 4 + s % 4 / 2 * 8, 8 * j + lane % 4 * 2 + s % 2};
}

// Computes a unit again with ordinary multiply-adds, because its sums are not finite. The tensor
// cores give a wrong NaN or infinity in three cases: splitting infinity computes infinity minus
// infinity, numbers close to the largest float round to infinity as bfloat16, and the zeros of a
// missing gradient are multiplied by infinity.
template <typename G>
__device__ __noinline__ void gram_mma_plain_unit(const GramTable& table, int first, int other,
                                                 int tile, double* own) {
  using T = typename G::T;
  const int lane = threadIdx.x % 32;
  const TileWalk at(table, blockIdx.y * table.tiles_per_segment + tile, G::kTile);
  const int p = at.p;
  const int64_t x = at.x + threadIdx.x / 32 * G::kUnit;
  const int64_t end = x + G::kUnit < table.numel[p] ? x + G::kUnit : table.numel[p];
  for (int s = 0; s < G::kSums; ++s) {
    const Place place = place_of_sum<G>(s, lane);
    const T* a = table.gradient<T>(p, first + place.row);
    const T* b = table.gradient<T>(p, other + place.column);
    if (a == nullptr || b == nullptr) continue;
    float sum = 0;
    for (int64_t y = x; y < end; ++y) sum += widen(a[y]) * widen(b[y]);
    own[s * 32 + lane] += sum;
  }
}

// Iterates over the pieces that a warp reads in a segment. A piece is a group of columns that is
// loaded at once; kPieces of them make a unit.
template <typename G>
class PieceWalk {
 public:
  __device__ PieceWalk(const GramTable& table, int64_t begin, int64_t end)
      : at_(table, begin, G::kTile), table_(table), tiles_(static_cast<int>(end - begin)) {
    skip();
  }

  __device__ bool done() const { return tile_ == tiles_; }
  __device__ int tile() const { return tile_; }
  __device__ int p() const { return at_.p; }
  __device__ int64_t unit() const { return at_.x + threadIdx.x / 32 * G::kUnit; }  // first column

  // True once all pieces of the unit are loaded, until move_on() goes to the next unit.
  __device__ bool ends_unit() const { return piece == G::kPieces; }

  __device__ void move_on() {
    piece = 0;
    step();
    skip();
  }

  int piece = 0;              // index in the unit
  bool new_parameter = true;  // the parameter has changed since this was set to false

 private:
  __device__ void step() {
    const int p = at_.p;
    if (++tile_ < tiles_) at_.next(G::kTile);
    new_parameter |= at_.p != p;
  }

  // Skips the tiles in which this warp's unit is past the end of the parameter.
  __device__ void skip() {
    while (tile_ < tiles_ && unit() >= table_.numel[at_.p]) step();
  }

  TileWalk at_;
  const GramTable& table_;
  int tile_ = 0;  // index in the segment
  const int tiles_;
};

// Computes one segment. The left tasks start at `first` and the right tasks at `other`, which is
// the same with kTriangle.
template <typename G>
__device__ void gram_mma_block(const GramTable& table, int first, int other, double* partial,
                               void* shared) {
  using T = typename G::T;
  using F = Fragment<T>;
  auto* sums = static_cast<double*>(shared);  // [kWarps, kSums, 32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double* own = sums + warp * G::kSums * 32;  // of this warp; a lane uses only its own column
  for (int s = 0; s < G::kSums; ++s) own[s * 32 + lane] = 0;
  // This warp's pointers to the rows of one parameter. In registers they would leave too little
  // room for the sums.
  auto* rows = reinterpret_cast<const T**>(static_cast<unsigned char*>(shared) + G::kSumBytes) +
               warp * 8 * G::kRows;

  const int64_t all = table.end_tile[table.parameters - 1];
  const int64_t begin = blockIdx.y * table.tiles_per_segment;
  const int64_t end = begin + table.tiles_per_segment < all ? begin + table.tiles_per_segment : all;
  Words ahead[G::kLoads][G::kRows] = {};
  const auto load = [&](PieceWalk<G>& at) {
    const int p = at.p();
    if (at.new_parameter) {
      at.new_parameter = false;
      __syncwarp();
      for (int r = lane; r < 8 * G::kRows; r += 32) {
        const int task = r < 8 * G::kLeft ? first + r : other + r - 8 * G::kLeft;
        rows[r] = table.gradient<T>(p, task);
      }
      __syncwarp();
    }
    const int64_t n = table.numel[p], x = at.unit();
    const int y = at.piece * G::kPiece + lane % 4 * kPerVector<T>;
    if (table.aligned[p] && x + G::kUnit <= n) {
#pragma unroll
      for (int l = 0; l < G::kLoads; ++l) {
#pragma unroll
        for (int r = 0; r < G::kRows; ++r) {
          const T* row = rows[8 * r + lane / 4];
          ahead[l][r] = stream_words<true>(row + x + y + l * G::kWidth, row != nullptr);
        }
      }
    } else {
      const int n_here = n - x < G::kUnit ? static_cast<int>(n - x) : G::kUnit;
#pragma unroll
      for (int l = 0; l < G::kLoads; ++l) {
#pragma unroll
        for (int r = 0; r < G::kRows; ++r) {
          const T* row = rows[8 * r + lane / 4];
          ahead[l][r] = {};
          if (row != nullptr) {
            ahead[l][r] = bits_as<Words>(load_ragged(row + x, y + l * G::kWidth, n_here));
          }
        }
      }
    }
  };

  float sum[G::kSums] = {};
  PieceWalk<G> next(table, begin, end);
  bool more;
#pragma unroll 1
  do {  // the first iteration adds zeros
    // Convert the whole piece first. This frees its registers, so that the next piece can be loaded
    // during the products.
    F fragments[G::kLoads][kPerVector<T> / 4][G::kRows];
#pragma unroll
    for (int l = 0; l < G::kLoads; ++l) {
#pragma unroll
      for (int step = 0; step < kPerVector<T> / 4; ++step) {
#pragma unroll
        for (int r = 0; r < G::kRows; ++r) fragments[l][step][r] = fragment<T>(ahead[l][r], step);
      }
    }
    const int tile = next.tile();
    const bool ends_unit = next.ends_unit();
    if (ends_unit) next.move_on();
    more = !next.done();
    if (more) {
      load(next);
      ++next.piece;
    }
#pragma unroll
    for (int l = 0; l < G::kLoads; ++l) {
#pragma unroll
      for (int step = 0; step < kPerVector<T> / 4; ++step) {
        const F* left = fragments[l][step];
        const F* right = left + (G::kTriangle ? 0 : G::kLeft);
        int s = 0;
#pragma unroll
        for (int i = 0; i < G::kLeftTiles; ++i) {
#pragma unroll
          for (int j = G::first_right(i); j < G::kRight; j += G::kBeside) {
            float d[G::kBeside][4] = {};
#pragma unroll
            for (int q = 0; q < F::kProducts; ++q) {
              const Product parts = product_of_parts<T>(q);
              const uint32_t a[4] = {
                  left[2 * i].word[parts.left][0], left[2 * i + 1].word[parts.left][0],
                  left[2 * i].word[parts.left][1], left[2 * i + 1].word[parts.left][1]};
#pragma unroll
              for (int m = 0; m < G::kBeside; ++m) {
                if (j + m < G::kRight) mma(T{}, d[m], a, right[j + m].word[parts.right]);
              }
            }
            // Tensor cores truncate instead of rounding. So each operation starts from zero and
            // sums only 16 products, and the float32 units, which round, add the results.
#pragma unroll
            for (int m = 0; m < G::kBeside; ++m) {
              if (j + m >= G::kRight) continue;
#pragma unroll
              for (int c = 0; c < 4; ++c) sum[s++] += d[m][c];
            }
          }
        }
      }
    }
    if (ends_unit) {
      float probe = 0;  // NaN if one of the sums is not finite
#pragma unroll
      for (int s = 0; s < G::kSums; ++s) probe += 0.0f * sum[s];
      if (__any_sync(~0u, !(probe == 0.0f))) {
        gram_mma_plain_unit<G>(table, first, other, tile, own);
      } else {
#pragma unroll
        for (int s = 0; s < G::kSums; ++s) own[s * 32 + lane] += sum[s];
      }
#pragma unroll
      for (int s = 0; s < G::kSums; ++s) sum[s] = 0;
    }
  } while (more);

  __syncthreads();
  const int64_t K = table.K;
  partial += (table.first_segment + blockIdx.y) * (K * (K + 1) / 2);
  for (int at_sum = threadIdx.x; at_sum < G::kSums * 32; at_sum += G::kThreads) {
    double result = 0;
    for (int w = 0; w < G::kWarps; ++w) result += sums[w * G::kSums * 32 + at_sum];
    const Place place = place_of_sum<G>(at_sum / 32, at_sum % 32);
    const int64_t i = first + place.row, j = other + place.column;
    if (i <= j && j < K) partial[pair_index(i, j, K)] = result;
  }
}

// More than 64 tasks are split into blocks of 64. One kernel computes the products within each
// block. Another computes the products between blocks, for each pair of halves of two different
// blocks.
constexpr int kMmaBlock = 64;
constexpr int kMmaHalf = kMmaBlock / 2;

// The y-th pair of halves.
struct Halves {
  int first, other;  // the first task of each half
};

__device__ inline Halves halves(int y) {
  const int quarter = y % 4;
  int a = y / 4, b = 1;  // a pair of blocks, a < b
  while (a >= b) a -= b++;
  return {a * kMmaBlock + quarter / 2 * kMmaHalf, b * kMmaBlock + quarter % 2 * kMmaHalf};
}

constexpr int64_t pairs_of_halves(int64_t K) {
  const int64_t blocks = (K + kMmaBlock - 1) / kMmaBlock;
  return 2 * blocks * (blocks - 1);
}

}  // namespace taskgroup
