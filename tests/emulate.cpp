// The kernels of msda.cu, run on a CPU: its whole source, compiled as C++.
// A lane is a fiber. It runs until it meets the other lanes of its warp (an exchange or a barrier),
// then the next runs, in random order: a kernel that forgets a barrier, or where only some lanes of
// a warp meet, is found. A block's warps run one after another: they never wait for each other.
#include <ucontext.h>
#include <algorithm>
#include <bit>
#include <cmath>
#include <random>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
using std::exp;
using std::max;
using std::min;

struct { unsigned x; } threadIdx, blockIdx, blockDim;

float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
struct f16;
float widen(f16 x);
void narrow(float x, f16 &y);

constexpr int WARP_SIZE = 32;
ucontext_t scheduler, lanes[WARP_SIZE];
char stacks[WARP_SIZE][1 << 16];
int now, meetings[WARP_SIZE];  // the lane that runs; how often each has met the others
bool done[WARP_SIZE];
double exchanged[2][WARP_SIZE];  // by turns: a lane may be one meeting ahead of those still reading

void meet() {
    meetings[now]++;
    swapcontext(&lanes[now], &scheduler);
}
void __syncwarp() { meet(); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
    const int turn = meetings[now] & 1;
    exchanged[turn][now] = x;
    meet();
    return mask == 0xffffffff ? (T)exchanged[turn][now ^ distance] : NAN;
}
template <typename T>
void atomicAdd(T *to, T x) { *to += x; }
template <typename T, int N>
void add_to_memory(T *to, const T (&x)[N]) {
    for (int i = 0; i < N; i++) to[i] += x[i];
}

#include "msda.cu"

float widen(f16 x) { return std::bit_cast<_Float16>(x); }
void narrow(float x, f16 &y) { y = std::bit_cast<f16>((_Float16)x); }

Point<A> scratch[256 * STRIDE];

// Call work() in every lane of every block. False when lanes of a warp met unequally often.
template <typename Work>
bool run(unsigned blocks, unsigned threads, Work work) {
    static Work *job;
    static std::mt19937 random(0);
    job = &work;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        // What a kernel reads before writing it shows as NaN.
        for (auto &p : scratch) p = {(A)NAN, (A)NAN, (A)NAN, 1 << 30};
        for (unsigned warp = 0; warp < threads / WARP_SIZE; warp++) {
            int order[WARP_SIZE], left = WARP_SIZE;
            for (int i = 0; i < WARP_SIZE; i++) {
                order[i] = i, meetings[i] = 0, done[i] = false;
                getcontext(&lanes[i]);
                lanes[i].uc_stack.ss_sp = stacks[i];
                lanes[i].uc_stack.ss_size = sizeof stacks[i];
                lanes[i].uc_link = &scheduler;
                makecontext(&lanes[i], +[] { (*job)(), done[now] = true; }, 0);
            }
            while (left) {
                std::shuffle(order, order + WARP_SIZE, random);
                for (int i : order) {
                    now = i, threadIdx.x = warp * WARP_SIZE + i;
                    swapcontext(&scheduler, &lanes[i]);
                    left -= done[i];
                }
                if (left && left < WARP_SIZE) return false;
            }
        }
    }
    return true;
}

// As the driver has it, a[i] is where argument i lies.
template <typename... T, size_t... I>
bool call(void (*kernel)(T...), int blocks, int threads, void **a, std::index_sequence<I...>) {
    return run(blocks, threads, [=] { kernel(*(std::remove_const_t<T> *)a[I]...); });
}
extern "C" int run_forward(int blocks, int threads, void **a) {
    return call(forward, blocks, threads, a, std::make_index_sequence<9>());
}
extern "C" int run_backward(int blocks, int threads, void **a) {
    return call(backward, blocks, threads, a, std::make_index_sequence<13>());
}
