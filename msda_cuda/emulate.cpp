// The kernels of msda.cu, run on a CPU: its whole source, compiled as C++, for tests on machines without a GPU.
//
// A lane is a fiber. It runs until it meets the other lanes of its warp (an exchange or a barrier), then the next lane
// runs, in a random order that differs from one meeting to the next. So a kernel that forgets a barrier, or lets only some
// lanes of a warp meet, is found. A block's warps run one after another, as msda.cu's never wait for each other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
using std::exp;
using std::max;
using std::min;

struct { unsigned x; } threadIdx, blockIdx, blockDim;

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
float widen(f16 x) {
    _Float16 y;
    memcpy(&y, &x, 2);
    return y;
}
float widen(bf16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &u, 4);
    return y;
}
void narrow(float x, f16 &y) {
    const _Float16 h = (_Float16)x;
    memcpy(&y, &h, 2);
}
void narrow(float x, bf16 &y) {
    uint32_t u;
    memcpy(&u, &x, 4);
    y.bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff;
}

// ------------------------------------------------------------------------------------------------ a warp and its lanes
constexpr int WARP_SIZE = 32;
ucontext_t scheduler, lanes[WARP_SIZE];
std::vector<char> stacks[WARP_SIZE];
int now, meetings[WARP_SIZE];                           // the lane that runs; how often each has met the others
bool done[WARP_SIZE];
double exchanged[2][WARP_SIZE];                         // by turns: a lane may be one meeting ahead of those still reading

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

Point<A> scratch[256 * STRIDE];

// Call work() in every lane of every block, as blocks of `threads`. False when lanes of a warp met unequally often.
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
                stacks[i].resize(1 << 16);
                getcontext(&lanes[i]);
                lanes[i].uc_stack.ss_sp = stacks[i].data();
                lanes[i].uc_stack.ss_size = stacks[i].size();
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

// The kernels by name. As the driver has it, a[i] is where argument i lies.
extern "C" bool run_forward(int blocks, int threads, void **a) {
    return run(blocks, threads, [=] {
        forward(*(V **)a[0], *(O **)a[1], *(O **)a[2], *(A **)a[3], *(V **)a[4], *(Levels *)a[5], *(int *)a[6],
                *(int *)a[7], *(int *)a[8]);
    });
}
extern "C" bool run_backward(int blocks, int threads, void **a) {
    return run(blocks, threads, [=] {
        backward(*(V **)a[0], *(V **)a[1], *(O **)a[2], *(O **)a[3], *(A **)a[4], *(A **)a[5], *(O **)a[6], *(O **)a[7],
                 *(A **)a[8], *(Levels *)a[9], *(int *)a[10], *(int *)a[11], *(int *)a[12]);
    });
}
