// Runs CUDA kernels on the CPU and reports what a GPU would let pass or crash on.
//
// The threads of a block are fibers. One runs until it waits at a barrier; when all wait, they run
// on in another random order. So work that needs a barrier which is not there finds its input
// missing: shared memory starts out as 0xFF bytes, which are NaN in every floating type. Errors are
// reported for threads that miss a barrier others wait at, for writes beyond the shared memory that
// was asked for, for accesses not aligned to their type, and for launches beyond a GPU's limits.

#include <cuda_runtime.h>

#include <link.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a block gets without asking for more, and as much again to see what is written beyond.
constexpr size_t kMostSharedBytes = 48 * 1024;
thread_local uint4 dynamic_shared[2 * kMostSharedBytes / sizeof(uint4)];

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison = 0xFF;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  dim3 index;
  bool done;
  int line;  // of the barrier it waits at
};

std::mutex one_launch;
std::mt19937_64 random_order;
std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
Fiber* running = nullptr;
const std::function<void()>* thread_body;
std::string failure;
std::string failure_text;
cudaError_t last_error = cudaSuccess;

void suspend() { swapcontext(&running->context, &scheduler); }

void fiber_main() {
  (*thread_body)();
  running->done = true;
  suspend();
}

// All __shared__ variables of this library: its thread-local storage, as no others are in it.
std::span<unsigned char> shared_memory() {
  std::span<unsigned char> found;
  // Storage that nothing has touched yet does not exist.
  dynamic_shared[0].x = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        auto* storage = static_cast<unsigned char*>(library->dlpi_tls_data);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const size_t bytes = library->dlpi_phdr[i].p_memsz;
          const auto* ours = reinterpret_cast<unsigned char*>(dynamic_shared);
          if (library->dlpi_phdr[i].p_type == PT_TLS && storage != nullptr && ours >= storage &&
              ours < storage + bytes) {
            *static_cast<std::span<unsigned char>*>(result) = {storage, bytes};
          }
        }
        return 0;
      },
      &found);
  return found;
}

void start_fibers() {
  const size_t threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    getcontext(&fibers.back()->context);
  }
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned row = i / blockDim.x;
    fiber.index = dim3(i % blockDim.x, row % blockDim.y, row / blockDim.y);
    fiber.done = false;
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// From barrier to barrier, until all threads are done or one has failed.
void run_block(size_t dynamic_bytes) {
  start_fibers();
  std::vector<Fiber*> order;
  for (size_t i = 0; i < size_t(blockDim.x) * blockDim.y * blockDim.z; ++i) {
    order.push_back(fibers[i].get());
  }
  do {
    std::shuffle(order.begin(), order.end(), random_order);
    for (Fiber* fiber : order) {
      running = fiber;
      threadIdx = fiber->index;
      swapcontext(&scheduler, &fiber->context);
      running = nullptr;
      if (!failure.empty()) return;
    }
    for (const Fiber* fiber : order) {
      if (fiber->done != order[0]->done) {
        const int line = (fiber->done ? order[0] : fiber)->line;
        failure = "threads exited while others wait at the barrier in line " + std::to_string(line);
        return;
      }
      if (!fiber->done && fiber->line != order[0]->line) {
        failure = "threads wait at different barriers, in lines " + std::to_string(fiber->line) +
                  " and " + std::to_string(order[0]->line);
        return;
      }
    }
  } while (!order[0]->done);

  const auto* bytes = reinterpret_cast<const unsigned char*>(dynamic_shared);
  for (size_t i = dynamic_bytes; i < sizeof(dynamic_shared); ++i) {
    if (bytes[i] != kPoison) {
      failure = "shared memory was written at byte " + std::to_string(i) + " of " +
                std::to_string(dynamic_bytes);
      return;
    }
  }
}

}  // namespace

void barrier(int line) {
  running->line = line;
  suspend();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
      grid.z > 65535 || block.x < 1 || block.y < 1 || block.z < 1 || block.z > 64 ||
      uint64_t(block.x) * block.y * block.z > 1024 || config.dynamicSmemBytes > kMostSharedBytes) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  thread_body = &thread;
  failure.clear();
  const std::span<unsigned char> shared = shared_memory();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(shared.data(), kPoison, shared.size());
        run_block(config.dynamicSmemBytes);
        if (!failure.empty()) return last_error = cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace simt

// The compiler calls this before an access that is not aligned to its type (-fsanitize=alignment).
extern "C" void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t) {
  struct Location {
    const char* file;
    uint32_t line, column;
  };
  const auto& location = *static_cast<const Location*>(data);
  simt::failure = std::string("misaligned access at ") + location.file + ":" +
                  std::to_string(location.line);
  if (simt::running == nullptr) std::abort();
  simt::suspend();
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      simt::failure_text = "launch failure: " + simt::failure;
      return simt::failure_text.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

// A small device, so that few images are enough to give a block several.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

// Fixes the order in which threads run from the next block on.
extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) {
  simt::random_order.seed(seed);
}
