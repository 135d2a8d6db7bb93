// Multi-scale deformable attention on a GPU, forward and backward: Zhu et al. 2021, Eq. 3, from the
// layer's raw offsets and logits: neither locations nor attention weights ever reach device memory.
// cuda.py compiles this file at first use, with a config.h of its own:
//   V          type of value, output and their gradients: float, double, f16 or bf16
//   W          what a lane loads of them: V, or two halves, Two<V>
//   O          type of offsets, logits and their gradients: V or A
//   A          what is computed with, and the type of references: float, or double where V is
//   M D L P R  heads, channels of each, levels, points, and 2 (reference points) or 4 (boxes)
//   VEC        channels that a lane moves at once: 16 bytes where D allows
//   LANES      lanes that share one (image, query, head): a power of two up to 32
// and the kernels take and return
//   value [B, S, M, D]  offsets [B, Q, M, L, P, 2]  logits [B, Q, M, L, P]  reference [B, Q, L, R]
//   out   [B, Q, M, D]  and each gradient as what it is the gradient of
// Neighbouring lanes hold neighbouring channels: a corner is read in whole cache lines. A block's
// groups of LANES are one head's queries, in the encoder neighbours that read the same corners.
// First each lane prepares some of its group's points in shared memory, then all lanes
// read every point. Lanes of a warp never part: groups past the last query compute the last one
// again and write nothing. Blocks need no barrier.
#include "sampling.h"

// Half precision by its bits, so that no header of CUDA's is needed.
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
// Halves are loaded by two, in a 32-bit word: 16 bits at a time they cost more than the sums.
template <typename T> struct Two { unsigned bits; };
#define UNROLL _Pragma("unroll")

#ifdef __CUDACC__
__device__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ void narrow(float x, f16 &y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Add neighbouring numbers to device memory: from sm_90 on 16 bytes are one trip to the cache.
template <typename T, int N>
__device__ void add_to_memory(T *to, const T (&x)[N]) {
    constexpr int STEP = __CUDA_ARCH__ >= 900 && sizeof(T) == 4 && N % 4 == 0 ? 4 : 1;
    UNROLL for (int i = 0; i < N; i += STEP)
        if constexpr (STEP == 4)
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                         ::"l"(__cvta_generic_to_global(to + i)),
                         "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]));
        else
            atomicAdd(to + i, x[i]);
}
#endif
#include "config.h"

__device__ float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void narrow(float x, bf16 &y) {  // to nearest, ties to even; NaN stays NaN
    const unsigned u = __float_as_uint(x);
    y.bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff;
}
template <typename T> __device__ T widen(T x) { return x; }
template <typename T> __device__ void narrow(T x, T &y) { y = x; }
template <typename T> __device__ A widen(T x, int) { return widen(x); }
template <typename T> __device__ float widen(Two<T> x, int i) {
    return widen(T{(unsigned short)(x.bits >> 16 * i)});
}

constexpr int POINTS = L * P;
constexpr int STRIDE = POINTS | 1;  // odd, so that groups side by side use different memory banks
constexpr int CHUNKS = (D + VEC * LANES - 1) / (VEC * LANES);  // of VEC channels, for each lane
constexpr int PER = sizeof(W) / sizeof(V);
constexpr unsigned WARP = 0xffffffff;

struct Levels { int h[L], w[L], start[L]; };
template <typename T>
struct alignas(VEC * sizeof(V)) Pack { T x[VEC * sizeof(V) / sizeof(T)]; };

extern __shared__ Point<A> scratch[];  // STRIDE for each group

__device__ Pack<W> load(const V *from, bool exists) {
    return exists ? *(const Pack<W> *)from : Pack<W>{};  // all bits 0: 0 in every type
}
__device__ A number(const Pack<W> &pack, int i) { return widen(pack.x[i / PER], i % PER); }

__device__ A group_max(A x) {
    UNROLL for (int s = LANES / 2; s; s /= 2) x = max(x, __shfl_xor_sync(WARP, x, s));
    return x;
}
__device__ A group_sum(A x) {
    UNROLL for (int s = LANES / 2; s; s /= 2) x += __shfl_xor_sync(WARP, x, s);
    return x;
}

// Sum N numbers over the group's lanes; lane i gets the sum of number i / (LANES / N). At each
// step a lane hands half of its numbers to a partner: N - 1 exchanges instead of N log(LANES).
template <int N>
__device__ A scattered_sum(A (&x)[N], int lane) {
    UNROLL for (int n = N / 2, s = LANES / 2; n; n /= 2, s /= 2) {
        const bool upper = lane & s;
        UNROLL for (int i = 0; i < n; i++) {
            const A kept = upper ? x[i + n] : x[i], given = upper ? x[i] : x[i + n];
            x[i] = kept + __shfl_xor_sync(WARP, given, s);
        }
    }
    UNROLL for (int rest = LANES / 2 / N; rest; rest /= 2)
        x[0] += __shfl_xor_sync(WARP, x[0], rest);
    return x[0];
}

// The i-th token where each map is walked in tiles of 8 x 8: -1 in a tile's part outside its map.
__device__ int tiled(const Levels &levels, int i) {
    UNROLL for (int l = 0; l < L; l++) {
        const int h = levels.h[l], w = levels.w[l], across = (w + 7) / 8;
        const int tokens = (h + 7) / 8 * across * 64;
        if (i < tokens) {
            const int x = i / 64 % across * 8 + i % 8, y = i / 64 / across * 8 + i % 64 / 8;
            return x < w && y < h ? levels.start[l] + y * w + x : -1;
        }
        i -= tokens;
    }
    return -1;
}

// Which (image, query, head) a group computes, and the group's points. blocks: of an image's head.
struct Place {
    int b, m, lane;
    bool alive;
    long long bq, row;  // row: of [B, Q, M, ...]
    Point<A> *points;

    __device__ Place(const Levels &levels, int S, int Q, int blocks) {
        const int group = threadIdx.x / LANES, pair = blockIdx.x / blocks;
        int q = blockIdx.x % blocks * (blockDim.x / LANES) + group;
        if (R == 2 && Q == S) q = tiled(levels, q);  // tokens around points, as in an encoder
        b = pair / M, m = pair % M, lane = threadIdx.x % LANES;
        alive = q >= 0 && q < Q;
        bq = (long long)b * Q + max(0, min(q, Q - 1)), row = bq * M + m;
        points = scratch + group * STRIDE;
    }

    // Softmax over the points, and where each of them falls.
    __device__ void prepare(const O *offsets, const O *logits, const A *reference,
                            const Levels &levels) const {
        offsets += row * POINTS * 2, logits += row * POINTS, reference += bq * L * R;
        A top = widen(logits[0]), total = 0;
        for (int k = lane; k < POINTS; k += LANES) top = max(top, widen(logits[k]));
        top = group_max(top);
        for (int k = lane; k < POINTS; k += LANES)
            total += points[k].weight = exp(widen(logits[k]) - top);
        total = group_sum(total);
        for (int k = lane; k < POINTS; k += LANES) {
            const int l = k / P, h = levels.h[l], w = levels.w[l];
            const A x = pixel<A, R>(reference + l * R, widen(offsets[2 * k]), 0, w, P);
            const A y = pixel<A, R>(reference + l * R, widen(offsets[2 * k + 1]), 1, h, P);
            points[k] = locate(x, y, points[k].weight / total, h, w, levels.start[l]);
        }
        __syncwarp();
    }

    // The lane's channel of the image's first token.
    __device__ long long first(long long S) const { return b * S * M * D + m * D + lane * VEC; }
};

extern "C" __global__ void __launch_bounds__(256)
forward(const V *__restrict__ value, const O *__restrict__ offsets, const O *__restrict__ logits,
        const A *__restrict__ reference, V *__restrict__ out, const Levels levels, int S, int Q,
        int blocks) {
    const Place at(levels, S, Q, blocks);
    at.prepare(offsets, logits, reference, levels);
    value += at.first(S);
    A sum[CHUNKS][VEC] = {};
    for (int l = 0; l < L; l++) {
        const int w = levels.w[l];
#pragma unroll 4
        for (int k = l * P; k < l * P + P; k++) {
            const Point<A> p = at.points[k];
            UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const int channel = chunk * LANES * VEC;
                const bool mine = channel + at.lane * VEC < D;
                Pack<W> v[4];
                UNROLL for (int c = 0; c < 4; c++)
                    v[c] = load(value + p.token(c, w) * (M * D) + channel, mine && p.has(c));
                UNROLL for (int c = 0; c < 4; c++)
                    UNROLL for (int i = 0; i < VEC; i++)
                        sum[chunk][i] += p.weight * p.bilinear(c) * number(v[c], i);
            }
        }
    }
    UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = (chunk * LANES + at.lane) * VEC;
        if (!at.alive || channel >= D) continue;
        Pack<V> pack;
        UNROLL for (int i = 0; i < VEC; i++) narrow(sum[chunk][i], pack.x[i]);
        *(Pack<V> *)(out + at.row * D + channel) = pack;
    }
}

// grad_value and grad_reference (or null) come zeroed: queries add to them, in no fixed order.
extern "C" __global__ void __launch_bounds__(256)
backward(const V *__restrict__ value, const O *__restrict__ offsets, const O *__restrict__ logits,
         const A *__restrict__ reference, const V *__restrict__ grad_out,
         A *__restrict__ grad_value, O *__restrict__ grad_offsets, O *__restrict__ grad_logits,
         A *__restrict__ grad_reference, const Levels levels, int S, int Q, int blocks) {
    constexpr int N = LANES < 4 ? LANES : 4;  // points whose sums travel together
    const Place at(levels, S, Q, blocks);
    at.prepare(offsets, logits, reference, levels);
    value += at.first(S), grad_value += at.first(S);
    A grad[CHUNKS][VEC];
    UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = (chunk * LANES + at.lane) * VEC;
        const Pack<W> pack = load(grad_out + at.row * D + channel, at.alive && channel < D);
        UNROLL for (int i = 0; i < VEC; i++) grad[chunk][i] = number(pack, i);
    }
    for (int first = 0; first < POINTS; first += N) {
        A flow_weight[N], flow_x[N], flow_y[N];
        UNROLL for (int j = 0; j < N; j++) {
            const int k = min(first + j, POINTS - 1), w = levels.w[k / P];
            const Point<A> p = at.points[k];
            const bool real = at.alive && first + j < POINTS;
            Flow<A> flow = {0, 0, 0};
            UNROLL for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const int channel = chunk * LANES * VEC;
                const bool mine = real && channel + at.lane * VEC < D;
                Pack<W> v[4];
                UNROLL for (int c = 0; c < 4; c++)
                    v[c] = load(value + p.token(c, w) * (M * D) + channel, mine && p.has(c));
                UNROLL for (int c = 0; c < 4; c++) {
                    A dot = 0, part[VEC];
                    UNROLL for (int i = 0; i < VEC; i++) {
                        dot += grad[chunk][i] * number(v[c], i);
                        part[i] = grad[chunk][i] * (p.weight * p.bilinear(c));
                    }
                    flow.add(p, c, dot);
                    if (mine && p.has(c))
                        add_to_memory(grad_value + p.token(c, w) * (M * D) + channel, part);
                }
            }
            flow_weight[j] = flow.weight, flow_x[j] = flow.x, flow_y[j] = flow.y;
        }
        const Flow<A> flow = {scattered_sum(flow_weight, at.lane), scattered_sum(flow_x, at.lane),
                              scattered_sum(flow_y, at.lane)};
        __syncwarp();  // every lane has read these points: they may be overwritten
        const int k = first + at.lane / (LANES / N);
        if (at.lane % (LANES / N) || k >= POINTS) continue;  // one lane of the group owns the point
        const int l = k / P;
        const A *box = reference + (at.bq * L + l) * R;
        UNROLL for (int axis = 0; axis < 2; axis++) {
            const int size = axis ? levels.h[l] : levels.w[l];
            const A grad_pixel = (axis ? flow.y : flow.x) * at.points[k].weight;
            const long long i = (at.row * POINTS + k) * 2 + axis;
            if (at.alive)
                narrow(flow_to_offset<A, R>(grad_pixel, box, axis, size, P), grad_offsets[i]);
            if (!at.alive || !grad_reference) continue;
            A *to = grad_reference + (at.bq * L + l) * R;
            flow_to_reference<A, R>(grad_pixel, widen(offsets[i]), axis, size, P,
                                    [&](int of, A amount) { atomicAdd(to + of, amount); });
        }
        at.points[k].fx = flow.weight;
    }
    __syncwarp();
    // Softmax, backwards: dL/dlogit_k = a_k (dL/da_k - sum_j a_j dL/da_j).
    A mean = 0;
    for (int k = at.lane; k < POINTS; k += LANES) mean += at.points[k].weight * at.points[k].fx;
    mean = group_sum(mean);
    grad_logits += at.row * POINTS;
    for (int k = at.lane; k < POINTS; k += LANES)
        if (at.alive) narrow(at.points[k].weight * (at.points[k].fx - mean), grad_logits[k]);
}
