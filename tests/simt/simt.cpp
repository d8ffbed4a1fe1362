// Runs CUDA kernels on the CPU and reports what a GPU would let pass or crash on.
//
// The threads of a block are fibers. One runs until it waits at a barrier, or for the other lanes
// of its warp. The lanes that can run on do so in a random order, and so do the warps, each of them
// as far as it can: nothing but a barrier keeps one from being far ahead of another. So work that
// needs a barrier which is not there finds its input missing: shared memory starts out as 0xFF
// bytes, which are NaN in every floating type, and asynchronous copies arrive when they are waited
// for and not before. A warpgroup's products are carried out when they are waited for, too, and see
// shared memory as it was shown to them. Errors are reported for threads that miss a barrier others
// wait at or have arrived at, for lanes that miss what their warp or warpgroup does together, for
// products of memory that was not shown to them or has changed since, for writes beyond the shared
// memory that was asked for, for accesses not aligned to their type, and for launches beyond a
// GPU's limits.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a block gets without asking for more, what every GPU has for one that asks, and room to see
// what is written beyond.
constexpr size_t kSharedBytes = 48 * 1024, kMostSharedBytes = 99 * 1024;
// Static shared memory, which counts too. The host's compiler does not tell a kernel's own, so all
// are taken to have this much.
constexpr size_t kStaticSharedBytes = 2048;
alignas(1024) thread_local uint4 dynamic_shared[(kMostSharedBytes + kSharedBytes) / sizeof(uint4)];

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison = 0xFF;

constexpr size_t kLanes = 32, kWarpgroup = 128;
// Where the dynamic shared memory of a kernel without any other begins on a GPU.
constexpr uint32_t kFirstAddress = 1024;

// Barriers of a block that have a number, besides __syncthreads.
constexpr size_t kNumbered = 16;

enum class State { kReady, kPaused, kAtBarrier, kAtNumbered, kWithWarp, kDone };

struct NumberedBarrier {
  size_t here = 0, expected = 0;
  bool all_have_shown = true;
};

struct Copy {
  void* to;
  std::array<unsigned char, 16> bytes;
};

struct Product {
  float* sums;
  std::function<void(float*)> multiply;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  dim3 index;
  size_t number;
  bool started;
  State state;
  int line;           // of the barrier it waits at
  size_t at_barrier;  // the number of the one it waits at
  bool is_slow;       // whether others go on when it arrives at a numbered barrier
  size_t pause;       // rounds in which they do
  Collective collective;
  void* operands;
  std::vector<std::vector<Copy>> copies;  // under way, the group that is still open last
  std::vector<Product> products;          // under way
  std::map<float*, std::vector<float>> sums_under_way;
  size_t committed;
  bool may_multiply, has_shown;
};

std::mutex one_launch;
std::map<const void*, size_t> allowed_shared;
bool only_record = false;
std::string recorded;
std::mt19937_64 random_order;
std::vector<std::unique_ptr<Fiber>> fibers;
std::array<NumberedBarrier, kNumbered> numbered;
std::vector<size_t> arrived[2];  // lanes of each warp, of each warpgroup, that wait for the others
// Dynamic shared memory when a thread last showed what it wrote, and as products see it.
std::vector<unsigned char> shown, seen;
jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* thread_body;
std::string failure;
std::string failure_text;
cudaError_t last_error = cudaSuccess;

// Without the system calls of swapcontext, which would be most of the time.
void suspend() {
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
  }
  running = nullptr;
}

void fiber_main() {
  (*thread_body)();
  running->state = State::kDone;
  suspend();
}

size_t block_threads() { return size_t(blockDim.x) * blockDim.y * blockDim.z; }

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
  while (fibers.size() < block_threads()) {
    fibers.push_back(std::make_unique<Fiber>());
    getcontext(&fibers.back()->entry);
  }
  numbered.fill({});
  for (auto& counts : arrived) counts.assign((block_threads() + kLanes - 1) / kLanes, 0);
  for (size_t i = 0; i < block_threads(); ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned row = i / blockDim.x;
    fiber.index = dim3(i % blockDim.x, row % blockDim.y, row / blockDim.y);
    fiber.number = i;
    fiber.started = false;
    fiber.is_slow = i % kWarpgroup == 0 ? random_order() % 2 : fibers[i - 1]->is_slow;
    fiber.state = State::kReady;
    fiber.copies.assign(1, {});
    fiber.products.clear();
    fiber.sums_under_way.clear();
    fiber.committed = 0;
    fiber.may_multiply = fiber.has_shown = false;
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
  }
}

// When no thread can run: lets all of them pass their barrier, or reports what keeps them from it.
// Returns whether any are left.
bool pass_barrier() {
  const std::span<const std::unique_ptr<Fiber>> threads(fibers.data(), block_threads());
  const Fiber& first = *threads[0];
  bool all_have_shown = true;
  for (const auto& fiber : threads) {
    if (fiber->state == State::kAtNumbered) {
      failure = "threads wait at barrier " + std::to_string(fiber->at_barrier) +
                ", where others do not arrive";
    } else if (fiber->state == State::kWithWarp) {
      failure = "lanes wait for others of their warp or warpgroup, which are elsewhere";
    } else if (fiber->state != first.state) {
      const int line = (fiber->state == State::kDone ? first : *fiber).line;
      failure = "threads exited while others wait at the barrier in line " + std::to_string(line);
    } else if (fiber->state == State::kAtBarrier && fiber->line != first.line) {
      failure = "threads wait at different barriers, in lines " + std::to_string(fiber->line) +
                " and " + std::to_string(first.line);
    }
    if (!failure.empty()) return false;
  }
  if (first.state == State::kDone) return false;
  for (const auto& fiber : threads) {
    fiber->state = State::kReady;
    all_have_shown &= std::exchange(fiber->has_shown, false);
  }
  if (all_have_shown) seen = shown;
  return true;
}

// Runs the lanes of a warp for as long as any can.
void run_warp(size_t warp) {
  std::vector<Fiber*> order;
  for (;;) {
    order.clear();
    for (size_t i = warp * kLanes; i < std::min((warp + 1) * kLanes, block_threads()); ++i) {
      if (fibers[i]->state == State::kReady) order.push_back(fibers[i].get());
    }
    if (order.empty()) return;
    std::shuffle(order.begin(), order.end(), random_order);
    for (Fiber* fiber : order) {
      resume(*fiber);
      if (!failure.empty()) return;
    }
  }
}

// A warp that came last to what its group does together has let the others go on.
bool any_can_run() {
  bool any = false;
  for (size_t i = 0; i < block_threads(); ++i) {
    Fiber& fiber = *fibers[i];
    if (fiber.state == State::kPaused && fiber.pause-- == 0) fiber.state = State::kReady;
    any |= fiber.state == State::kReady || fiber.state == State::kPaused;
  }
  return any;
}

// Until all threads are done or one has failed.
void run_block(size_t dynamic_bytes) {
  start_fibers();
  shown.assign(dynamic_bytes, kPoison);
  seen = shown;
  std::vector<size_t> warps((block_threads() + kLanes - 1) / kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  do {
    std::shuffle(warps.begin(), warps.end(), random_order);
    for (size_t warp : warps) {
      run_warp(warp);
      if (!failure.empty()) return;
    }
  } while (any_can_run() || pass_barrier());
  if (!failure.empty()) return;

  for (size_t i = 0; i < kNumbered; ++i) {
    if (numbered[i].here == 0) continue;
    failure = "threads arrived at barrier " + std::to_string(i) + ", where others do not wait";
    return;
  }
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
  running->state = State::kAtBarrier;
  suspend();
}

namespace {

void come_to(size_t number, size_t threads) {
  NumberedBarrier& barrier = numbered.at(number);
  if (barrier.here > 0 && barrier.expected != threads) {
    fail("threads expect different numbers of others at a barrier");
  }
  barrier.expected = threads;
  barrier.all_have_shown &= running->has_shown;
  if (++barrier.here < threads) return;
  if (barrier.all_have_shown) seen = shown;
  barrier = {};
  for (size_t i = 0; i < block_threads(); ++i) {
    if (fibers[i]->state == State::kAtNumbered && fibers[i]->at_barrier == number) {
      fibers[i]->state = State::kReady;
    }
  }
}

}  // namespace

void arrive_at(size_t number, size_t threads) {
  come_to(number, threads);
  if (!running->is_slow || !failure.empty()) return;
  running->pause = 4;
  running->state = State::kPaused;
  suspend();
}

void wait_at(size_t number, size_t threads) {
  running->at_barrier = number;
  running->state = State::kAtNumbered;
  come_to(number, threads);
  running->has_shown = false;
  if (running->state == State::kAtNumbered) suspend();
}

void fail(const char* why) {
  failure = why;
  suspend();
}

void together(Collective collective, void* operands, size_t count) {
  const size_t group = running->number / count;
  running->collective = collective;
  running->operands = operands;
  size_t& here = arrived[count != kLanes][group];
  if (++here < count) {
    running->state = State::kWithWarp;
    suspend();
    return;
  }
  here = 0;
  void* of_lanes[kWarpgroup];
  for (size_t i = 0; i < count; ++i) {
    Fiber& lane = *fibers[group * count + i];
    if (lane.collective != collective) fail("lanes of a warp do different things together");
    of_lanes[i] = lane.operands;
    lane.state = State::kReady;
  }
  collective(of_lanes);
}

void expect_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return;
  fail("an instruction of 16 bytes at an address that is not aligned to them");
}

void copy_later(void* to, const void* from, bool inside) {
  Copy copy = {to, {}};
  if (inside) std::memcpy(copy.bytes.data(), from, copy.bytes.size());
  running->copies.back().push_back(copy);
}

void commit_copies() { running->copies.emplace_back(); }

void wait_for_copies(size_t groups_left) {
  auto& groups = running->copies;
  while (groups.size() - 1 > groups_left) {
    for (const Copy& copy : groups.front())
      std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    groups.erase(groups.begin());
  }
}

void start_products() { running->may_multiply = true; }

void multiply_later(float* sums, std::function<void(float*)> multiply) {
  if (!running->may_multiply) fail("a product's registers are not fenced");
  if (running->sums_under_way.try_emplace(sums, sums, sums + 32).second) {
    std::fill_n(sums, 32, std::numeric_limits<float>::quiet_NaN());
  }
  running->products.push_back({sums, std::move(multiply)});
}

void commit_products() { running->committed = running->products.size(); }

void wait_for_products() {
  auto& products = running->products;
  for (size_t i = 0; i < running->committed; ++i) {
    products[i].multiply(running->sums_under_way[products[i].sums].data());
  }
  products.erase(products.begin(), products.begin() + running->committed);
  running->committed = 0;
  running->may_multiply = false;
  std::erase_if(running->sums_under_way, [&](const auto& under_way) {
    const auto& [sums, values] = under_way;
    for (const Product& product : products) {
      if (product.sums == sums) return false;
    }
    std::copy(values.begin(), values.end(), sums);
    return true;
  });
}

void show_to_products() {
  running->has_shown = true;
  std::memcpy(shown.data(), dynamic_shared, shown.size());
}

uint32_t shared_address(const void* p) {
  return kFirstAddress + (static_cast<const unsigned char*>(p) -
                          reinterpret_cast<const unsigned char*>(dynamic_shared));
}

// 16 bits of it.
const void* seen_by_products(uint32_t address) {
  const size_t offset = address - kFirstAddress;
  if (offset >= seen.size()) fail("a product reads beyond the dynamic shared memory");
  const auto* now = reinterpret_cast<const unsigned char*>(dynamic_shared) + offset;
  if (std::memcmp(now, &seen[offset], 2) != 0) {
    fail("a product reads shared memory that was not shown to it, or that has changed meanwhile");
  }
  return &seen[offset];
}

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> guard(one_launch);
  if (bytes + kStaticSharedBytes > kMostSharedBytes) return last_error = cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
      grid.z > 65535 || block.x < 1 || block.y < 1 || block.z < 1 || block.z > 64 ||
      uint64_t(block.x) * block.y * block.z > 1024 ||
      config.dynamicSmemBytes >
          std::max(kSharedBytes - kStaticSharedBytes, allowed_shared[kernel])) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  if (only_record) {
    Dl_info library;
    dladdr(reinterpret_cast<const void*>(&launch), &library);
    const auto offset =
        static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
    recorded += std::to_string(offset) + " " + std::to_string(block.x * block.y * block.z) + " " +
                std::to_string(config.dynamicSmemBytes) + "\n";
    return cudaSuccess;
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
  simt::failure =
      std::string("misaligned access at ") + location.file + ":" + std::to_string(location.line);
  if (simt::running == nullptr) std::abort();
  simt::suspend();
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      simt::failure_text = "launch failure: " + simt::failure;
      return simt::failure_text.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

// A small device, so that few images are enough to give a block several. A test may want more
// blocks.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* count = std::getenv("SIMT_MULTIPROCESSORS");
  *value = count != nullptr ? std::atoi(count) : 1;
  return cudaSuccess;
}

// Fixes the order in which threads run from the next block on.
extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) {
  simt::random_order.seed(seed);
}

// From here on kernels are not run, but recorded: a line with the kernel's place in this library,
// the threads of a block and its bytes of dynamic shared memory. Returns what was recorded so far.
extern "C" __attribute__((visibility("default"))) const char* simt_record(bool record) {
  static std::string result;
  simt::only_record = record;
  result = std::exchange(simt::recorded, {});
  return result.c_str();
}
