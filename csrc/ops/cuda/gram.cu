#include "ops/cuda/gram.h"

#include <algorithm>
#include <vector>

#include "ops/cuda/gram_finish.cuh"
#include "ops/cuda/gram_fma.cuh"
#include "ops/cuda/gram_mma.cuh"

namespace taskgroup {

namespace {

constexpr int kFmaTasks =
    16;                    // with at most this many tasks float32 gradients do not use tensor cores
constexpr int kWarps = 4;  // of a block that uses tensor cores
// With eight warps each thread can have 255 registers. Seven warps sum. If the GPU has bulk copies,
// the eighth fills the ring from which they read.
constexpr int kSummingThreads = 7 * 32, kFillingThreads = kHasBulkCopies ? 32 : 0;
constexpr int kFinishingThreads = 512;
constexpr int64_t kLeastTiles = 8;  // per segment
constexpr int64_t kMostSegments = 1024;
constexpr int64_t kMostPartials = 1 << 22;  // doubles: 32 MB

template <int R>
using FloatFma = GramFma<float, R, true, kSummingThreads>;
using DoubleFma = GramFma<double, 8, false, 256>;
template <typename T, int kTasks>
using Mma = GramMma<T, kTasks / 8, kTasks / 8, true, kWarps>;
template <typename T>
using MmaRectangle = GramMma<T, kMmaHalf / 8, kMmaHalf / 8, false, kWarps>;

template <int R>
__global__ void __launch_bounds__(kSummingThreads + kFillingThreads, R <= 8 ? 2 : 1)
    gram_fma_float(const __grid_constant__ GramTable table, double* partial, int stages) {
  extern __shared__ __align__(128) unsigned char shared[];
  gram_fma_block<FloatFma<R>, kHasBulkCopies>(table, 0, 0, partial, shared, stages);
}

__global__ void __launch_bounds__(DoubleFma::kThreads)
    gram_fma_double(const __grid_constant__ GramTable table, double* partial) {
  extern __shared__ __align__(128) unsigned char shared[];
  const BlockPair pair = block_pair(blockIdx.x);
  gram_fma_block<DoubleFma, false>(table, pair.a * DoubleFma::R, pair.b * DoubleFma::R, partial,
                                   shared, 0);
}

template <typename T, int kTasks>
__global__ void __launch_bounds__(kWarps * 32, Mma<T, kTasks>::kBlocks)
    gram_mma(const __grid_constant__ GramTable table, double* partial) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int first = blockIdx.x * kMmaBlock;
  gram_mma_block<Mma<T, kTasks>>(table, first, first, partial, shared);
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32, MmaRectangle<T>::kBlocks)
    gram_mma_rectangle(const __grid_constant__ GramTable table, double* partial) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Halves at = halves(blockIdx.x);
  gram_mma_block<MmaRectangle<T>>(table, at.first, at.other, partial, shared);
}

template <typename Result>
__global__ void __launch_bounds__(kFinishingThreads)
    gram_finish(const double* partial, int64_t segments, int64_t K,
                const __grid_constant__ Result result) {
  __shared__ double sums[kFinishingThreads];
  gram_finish_block<kFinishingThreads>(partial, segments, K, result, sums);
}

// The bytes of shared memory that a block may use.
int shared_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Whether this GPU has bulk copies and the kernel code that runs on it was built to use them.
template <typename Kernel>
bool has_bulk_copies(Kernel kernel) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaFuncAttributes code = {};
  return major >= 9 && cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
}

// The blocks of one segment run at the same time, so that they share their reads through the cache.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, const GramTable& table, int64_t blocks, int threads, size_t shared_bytes,
            int carve_out, cudaStream_t stream, double* partial, Arguments... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(shared_bytes));
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carve_out);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(table.segments));
  kernel<<<grid, threads, shared_bytes, stream>>>(table, partial, arguments...);
}

template <int R>
void launch_fma(const GramTable& table, double* partial, cudaStream_t stream) {
  using G = FloatFma<R>;
  const auto kernel = gram_fma_float<R>;
  int stages = 0, threads = kSummingThreads;
  if (has_bulk_copies(kernel)) {
    const auto most = static_cast<int>((shared_limit() - G::kBarrierBytes) / G::kStageBytes);
    stages = std::min(most, kMostStages);
    threads += 32;  // in host code kFillingThreads does not depend on the GPU
  }
  // The copy engine bypasses the L1 cache.
  const int carve_out = stages > 0 ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault;
  launch(kernel, table, 1, threads, G::shared_bytes(stages), carve_out, stream, partial, stages);
}

// The percentage of a multiprocessor's on-chip memory that serves as shared memory: just enough for
// all blocks that fit. The rest is the L1 cache, through which the blocks load.
template <typename G>
int carve_out() {
  constexpr size_t kOfSystem = 1024;  // bytes that CUDA reserves per block
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const size_t needed = G::kBlocks * (G::kSharedBytes + kOfSystem);
  return bytes > 0 ? static_cast<int>(std::min<size_t>((100 * needed + bytes - 1) / bytes, 100))
                   : cudaSharedmemCarveoutDefault;
}

template <typename T, int kTasks>
void launch_mma(const GramTable& table, double* partial, cudaStream_t stream) {
  using G = Mma<T, kTasks>;
  const int64_t blocks = (table.K + kMmaBlock - 1) / kMmaBlock;
  launch(gram_mma<T, kTasks>, table, blocks, G::kThreads, G::kSharedBytes, carve_out<G>(), stream,
         partial);
  if (blocks == 1) return;
  using Rectangle = MmaRectangle<T>;
  launch(gram_mma_rectangle<T>, table, pairs_of_halves(table.K), Rectangle::kThreads,
         Rectangle::kSharedBytes, carve_out<Rectangle>(), stream, partial);
}

using Launch = void (*)(const GramTable&, double* partial, cudaStream_t);

void launch_double(const GramTable& table, double* partial, cudaStream_t stream) {
  const int64_t blocks = (table.K + DoubleFma::R - 1) / DoubleFma::R;
  launch(gram_fma_double, table, blocks * (blocks + 1) / 2, DoubleFma::kThreads,
         DoubleFma::shared_bytes(0), cudaSharedmemCarveoutDefault, stream, partial);
}

// The kernel that reads gradients of a dtype, and its tile.
struct Reader {
  Launch launch;
  int64_t tile;
};

template <typename T>
Reader mma_reader(int64_t K) {
  static constexpr Launch kLaunches[] = {launch_mma<T, 16>, launch_mma<T, 32>, launch_mma<T, 48>,
                                         launch_mma<T, 64>};
  return {kLaunches[std::min<int64_t>((K - 1) / 16, 3)], Mma<T, 64>::kTile};
}

Reader reader(Dtype dtype, int64_t K) {
  static constexpr Launch kFma[] = {launch_fma<2>,  launch_fma<4>,  launch_fma<6>,  launch_fma<8>,
                                    launch_fma<10>, launch_fma<12>, launch_fma<14>, launch_fma<16>};
  switch (dtype) {
    case Dtype::kFloat:
      if (K <= kFmaTasks) return {kFma[(K - 1) / 2], FloatFma<2>::kTile};
      return mma_reader<float>(K);
    case Dtype::kBFloat16:
      return mma_reader<BFloat16>(K);
    case Dtype::kHalf:
      return mma_reader<Half>(K);
    default:
      return {launch_double, DoubleFma::kTile};
  }
}

template <typename Result>
void run(const Gradients& gradients, const Allocate& allocate, cudaStream_t stream,
         const Result& result) {
  const int64_t K = gradients.n_tasks, pairs = K * (K + 1) / 2;
  const int64_t most = std::clamp<int64_t>(kMostPartials / pairs, 8, kMostSegments);
  std::vector<GramTable> tables[4];
  Launch launches[4];
  int64_t segments = 0;
  for (int d = 0; d < 4; ++d) {
    const auto dtype = static_cast<Dtype>(d);
    const Reader read = reader(dtype, K);
    launches[d] = read.launch;
    tables[d] = gram_tables(gradients, dtype, read.tile, kLeastTiles, most);
    segments = number_segments(tables[d], segments);
  }
  double* partial = allocate(segments * pairs);
  for (int d = 0; d < 4; ++d) {
    for (const GramTable& table : tables[d]) launches[d](table, partial, stream);
  }
  const dim3 grid(static_cast<unsigned>((K + 31) / 32), static_cast<unsigned>(K));
  gram_finish<<<grid, kFinishingThreads, 0, stream>>>(partial, segments, K, result);
}

}  // namespace

void gram(const Gradients& gradients, const Allocate& allocate, CUstream_st* stream,
          const GramMatrix<float>& result) {
  run(gradients, allocate, stream, result);
}

void gram(const Gradients& gradients, const Allocate& allocate, CUstream_st* stream,
          const GramMatrix<double>& result) {
  run(gradients, allocate, stream, result);
}

void gram(const Gradients& gradients, const Allocate& allocate, CUstream_st* stream,
          const GramAffinity& result) {
  run(gradients, allocate, stream, result);
}

}  // namespace taskgroup
