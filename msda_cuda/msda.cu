// Multi-scale deformable attention on a GPU, forward and backward: Zhu et al. 2021, Eq. 3, from the layer's raw offsets
// and attention logits to its output, so that neither locations nor attention weights ever reach device memory.
//
// cuda.py compiles this file at first use, with a config.h that it writes:
//   V          type of value, output and their gradients: float, double, f16 or bf16
//   O          type of offsets, logits and their gradients: V or A
//   A          what is computed with, and the type of references: float, or double where V is
//   D L P R    channels a head, levels, points, and 2 (reference points) or 4 (boxes)
//   VEC        channels that a lane moves at once: 16 bytes where D allows
//   LANES      lanes that share one (image, query, head): a power of two up to 32
//
//   value   [B, S, M, D]           offsets [B, Q, M, L, P, 2]     logits [B, Q, M, L, P]
//   reference [B, Q, L, R]         out     [B, Q, M, D]           gradients: as what they are the gradient of
//
// A group of LANES lanes computes one (image, query, head); neighbouring lanes hold neighbouring channels, so that a
// corner is read in whole cache lines. A block's groups are one head's consecutive queries: in the encoder these are
// neighbours in the photo, read the same corners, and find them in the first-level cache. First each lane prepares some
// of its group's points (softmax, place, corners) in shared memory, then all lanes read every point. Lanes of a warp
// never part: groups past the last query compute the last one again and write nothing. Blocks need no barrier.
#include "sampling.h"

#ifdef __CUDACC__
// Half precision by its bits, so that no header of CUDA's is needed.
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

__device__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void narrow(float x, f16 &y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ void narrow(float x, bf16 &y) {                                    // to nearest, ties to even; NaN stays NaN
    const unsigned u = __float_as_uint(x);
    y.bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fff;
}

// Add neighbouring numbers to device memory: from sm_90 on 16 bytes are one instruction and one trip to the cache.
template <typename T, int N>
__device__ void add_to_memory(T *to, const T (&x)[N]) {
#if __CUDA_ARCH__ >= 900
    constexpr int STEP = sizeof(T) == 4 && N % 4 == 0 ? 4 : 1;
#else
    constexpr int STEP = 1;
#endif
#pragma unroll
    for (int i = 0; i < N; i += STEP)
        if constexpr (STEP == 4)
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + i)),
                         "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]));
        else
            atomicAdd(to + i, x[i]);
}
#endif
#include "config.h"

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ void narrow(float x, float &y) { y = x; }
__device__ void narrow(double x, double &y) { y = x; }

constexpr int POINTS = L * P;
constexpr int STRIDE = POINTS | 1;                        // odd, so that groups side by side use different memory banks
constexpr int CHUNKS = (D + VEC * LANES - 1) / (VEC * LANES);                  // times that a lane moves VEC channels
constexpr unsigned WARP = 0xffffffff;

struct Levels { int h[L], w[L], start[L]; };
struct alignas(VEC * sizeof(V)) Pack { V x[VEC]; };

extern __shared__ Point<A> scratch[];                                                      // STRIDE for each group

__device__ Pack load(const V *from, bool exists) {
    Pack pack = {};                                                       // all bits 0 is the number 0 in every type
    if (exists) pack = *(const Pack *)from;
    return pack;
}

__device__ A group_max(A x) {
#pragma unroll
    for (int s = LANES / 2; s; s /= 2) x = max(x, __shfl_xor_sync(WARP, x, s));
    return x;
}

__device__ A group_sum(A x) {
#pragma unroll
    for (int s = LANES / 2; s; s /= 2) x += __shfl_xor_sync(WARP, x, s);
    return x;
}

// Sum N numbers over the group's lanes; lane i gets the whole sum of number i / (LANES / N), in x[0]. In every step a lane
// hands half of its numbers to a partner and keeps the other half: N - 1 exchanges instead of N log(LANES).
template <int N>
__device__ A scattered_sum(A (&x)[N], int lane) {
#pragma unroll
    for (int n = N / 2, s = LANES / 2; n; n /= 2, s /= 2) {
        const bool upper = lane & s;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const A kept = upper ? x[i + n] : x[i], given = upper ? x[i] : x[i + n];
            x[i] = kept + __shfl_xor_sync(WARP, given, s);
        }
    }
#pragma unroll
    for (int rest = LANES / 2 / N; rest; rest /= 2) x[0] += __shfl_xor_sync(WARP, x[0], rest);
    return x[0];
}

// Which (image, query, head) a group computes, and the group's points.
struct Place {
    int b, m, lane;
    bool alive;
    long long bq, row;                                           // row: of [B, Q, M, ...]
    Point<A> *points;

    __device__ Place(int M, int Q) {
        const int groups = blockDim.x / LANES, group = threadIdx.x / LANES, blocks = (Q + groups - 1) / groups;
        const int pair = blockIdx.x / blocks, q = blockIdx.x % blocks * groups + group;
        b = pair / M, m = pair % M, lane = threadIdx.x % LANES;
        alive = q < Q;
        bq = (long long)b * Q + min(q, Q - 1);
        row = bq * M + m;
        points = scratch + group * STRIDE;
    }

    // Softmax over the points, and where each of them falls.
    __device__ void prepare(const O *offsets, const O *logits, const A *reference, const Levels &levels) const {
        offsets += row * POINTS * 2, logits += row * POINTS, reference += bq * L * R;
        A top = widen(logits[0]), total = 0;
        for (int k = lane; k < POINTS; k += LANES) top = max(top, widen(logits[k]));
        top = group_max(top);
        for (int k = lane; k < POINTS; k += LANES) total += points[k].weight = exp(widen(logits[k]) - top);
        total = group_sum(total);
        for (int k = lane; k < POINTS; k += LANES) {
            const int l = k / P, h = levels.h[l], w = levels.w[l];
            const A x = pixel<A, R>(reference + l * R, widen(offsets[2 * k]), 0, w, P);
            const A y = pixel<A, R>(reference + l * R, widen(offsets[2 * k + 1]), 1, h, P);
            points[k] = locate(x, y, points[k].weight / total, h, w, levels.start[l]);
        }
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(256)
forward(const V *__restrict__ value, const O *__restrict__ offsets, const O *__restrict__ logits,
        const A *__restrict__ reference, V *__restrict__ out, const Levels levels, int S, int M, int Q) {
    const Place at(M, Q);
    at.prepare(offsets, logits, reference, levels);
    const long long stride = (long long)M * D;
    value += at.b * (S * stride) + at.m * D + at.lane * VEC;
    A sum[CHUNKS][VEC] = {};
    for (int l = 0; l < L; l++) {
        const int w = levels.w[l];
#pragma unroll 4
        for (int k = l * P; k < l * P + P; k++) {
            const Point<A> p = at.points[k];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const int channel = chunk * LANES * VEC;
                const bool mine = channel + at.lane * VEC < D;
                Pack v[4];
#pragma unroll
                for (int c = 0; c < 4; c++) v[c] = load(value + p.token(c, w) * stride + channel, mine && p.has(c));
#pragma unroll
                for (int c = 0; c < 4; c++)
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[chunk][i] += p.weight * p.bilinear(c) * widen(v[c].x[i]);
            }
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = (chunk * LANES + at.lane) * VEC;
        if (!at.alive || channel >= D) continue;
        Pack pack;
#pragma unroll
        for (int i = 0; i < VEC; i++) narrow(sum[chunk][i], pack.x[i]);
        *(Pack *)(out + at.row * D + channel) = pack;
    }
}

// grad_value and grad_reference come zeroed and in A: many queries add to them, in no fixed order. grad_reference may be
// null. The points' corners are found again, which is cheaper than to have stored them.
extern "C" __global__ void __launch_bounds__(256, VEC == 8 ? 3 : 0)       // half precision would take one register too many
backward(const V *__restrict__ grad_out, const V *__restrict__ value, const O *__restrict__ offsets,
         const O *__restrict__ logits, const A *__restrict__ reference, A *__restrict__ grad_value,
         O *__restrict__ grad_offsets, O *__restrict__ grad_logits, A *__restrict__ grad_reference, const Levels levels,
         int S, int M, int Q) {
    constexpr int N = LANES < 4 ? LANES : 4;                                        // points whose sums travel together
    const Place at(M, Q);
    at.prepare(offsets, logits, reference, levels);
    const long long stride = (long long)M * D, first_channel = at.b * (S * stride) + at.m * D + at.lane * VEC;
    value += first_channel, grad_value += first_channel;
    A grad[CHUNKS][VEC];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int channel = (chunk * LANES + at.lane) * VEC;
        const Pack pack = load(grad_out + at.row * D + channel, at.alive && channel < D);
#pragma unroll
        for (int i = 0; i < VEC; i++) grad[chunk][i] = widen(pack.x[i]);
    }
    for (int first = 0; first < POINTS; first += N) {
        A flow_weight[N], flow_x[N], flow_y[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int k = min(first + j, POINTS - 1), w = levels.w[k / P];
            const Point<A> p = at.points[k];
            const bool real = at.alive && first + j < POINTS;
            Flow<A> flow = {0, 0, 0};
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const int channel = chunk * LANES * VEC;
                const bool mine = real && channel + at.lane * VEC < D;
                Pack v[4];
#pragma unroll
                for (int c = 0; c < 4; c++) v[c] = load(value + p.token(c, w) * stride + channel, mine && p.has(c));
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    A dot = 0, part[VEC];
#pragma unroll
                    for (int i = 0; i < VEC; i++) {
                        dot += grad[chunk][i] * widen(v[c].x[i]);
                        part[i] = grad[chunk][i] * (p.weight * p.bilinear(c));
                    }
                    flow.add(p, c, dot);
                    if (mine && p.has(c)) add_to_memory(grad_value + p.token(c, w) * stride + channel, part);
                }
            }
            flow_weight[j] = flow.weight, flow_x[j] = flow.x, flow_y[j] = flow.y;
        }
        const Flow<A> flow = {scattered_sum(flow_weight, at.lane), scattered_sum(flow_x, at.lane),
                              scattered_sum(flow_y, at.lane)};
        __syncwarp();                                          // every lane has read these points: they may be overwritten
        const int k = first + at.lane / (LANES / N);
        if (at.lane % (LANES / N) || k >= POINTS) continue;                          // one lane of the group owns the point
        const int l = k / P;
        const A *box = reference + (at.bq * L + l) * R;
#pragma unroll
        for (int axis = 0; axis < 2; axis++) {
            const int size = axis ? levels.h[l] : levels.w[l];
            const A grad_pixel = (axis ? flow.y : flow.x) * at.points[k].weight;
            const long long i = (at.row * POINTS + k) * 2 + axis;
            if (at.alive) narrow(flow_to_offset<A, R>(grad_pixel, box, axis, size, P), grad_offsets[i]);
            if (at.alive && grad_reference)
                flow_to_reference<A, R>(grad_pixel, widen(offsets[i]), axis, size, P, [&](int of, A amount) {
                    atomicAdd(grad_reference + (at.bq * L + l) * R + of, amount);
                });
        }
        at.points[k].fx = flow.weight;
    }
    __syncwarp();
    // Softmax, backwards: dL/dlogit_k = a_k (dL/da_k - sum_j a_j dL/da_j).
    A mean = 0;
    for (int k = at.lane; k < POINTS; k += LANES) mean += at.points[k].weight * at.points[k].fx;
    mean = group_sum(mean);
    for (int k = at.lane; k < POINTS; k += LANES)
        if (at.alive) narrow(at.points[k].weight * (at.points[k].fx - mean), grad_logits[at.row * POINTS + k]);
}
