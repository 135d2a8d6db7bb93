// Multi-scale deformable attention on a CPU, forward and backward: Zhu et al. 2021, Eq. 3, one point at a time, from the
// layer's raw offsets and attention logits to its output, with the arithmetic that the CUDA kernel has (sampling.h).
//
// Compiled by build.py at first use. Threads share out the (image, head) pairs, which write to disjoint memory: the result
// does not depend on how many there are.
//
//   value [B, S, M, D]   offsets [B, Q, M, L, P, 2]   logits [B, Q, M, L, P]   reference [B, Q, L, R]
//   shapes [L, 2] (h, w)   out [B, Q, M, D]   and each gradient as what it is the gradient of. grad_value comes zeroed,
//   and so does grad_reference [B, M, Q, L, R], one for each head, unless it is null
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "sampling.h"

struct Sizes {
    int64_t B, S, M, D, Q, L, P;
};

// Softmax over the points of one (query, head), and where each of them falls.
template <typename T, int R>
void prepare(Point<T> *points, const T *offsets, const T *logits, const T *reference, const int64_t *shapes,
             const Sizes &n) {
    const T top = *std::max_element(logits, logits + n.L * n.P);
    T total = 0;
    for (int64_t k = 0; k < n.L * n.P; k++) total += points[k].weight = std::exp(logits[k] - top);
    int start = 0;
    for (int64_t l = 0; l < n.L; l++) {
        const int h = shapes[2 * l], w = shapes[2 * l + 1];
        for (int64_t k = l * n.P; k < (l + 1) * n.P; k++) {
            const T x = pixel<T, R>(reference + l * R, offsets[2 * k], 0, w, n.P);
            const T y = pixel<T, R>(reference + l * R, offsets[2 * k + 1], 1, h, n.P);
            points[k] = locate(x, y, points[k].weight / total, h, w, start);
        }
        start += h * w;
    }
}

// FIXED: D where it is known when this is compiled, so that a query's sum stays in registers; 0: any D.
template <typename T, int R, int FIXED>
void forward(const T *value, const T *offsets, const T *logits, const T *reference, T *out, const int64_t *shapes, Sizes n) {
    const int64_t K = n.L * n.P, D = FIXED ? FIXED : n.D, stride = n.M * D;
#pragma omp parallel for
    for (int64_t pair = 0; pair < n.B * n.M; pair++) {
        std::vector<Point<T>> points(K);
        std::vector<T> any(D);
        T fixed[FIXED + 1], *const o = FIXED ? fixed : any.data();
        const int64_t b = pair / n.M, m = pair % n.M;
        const T *values = value + b * n.S * stride + m * D;
        for (int64_t q = 0; q < n.Q; q++) {
            const int64_t row = (b * n.Q + q) * n.M + m;
            const T *box = reference + (b * n.Q + q) * n.L * R;
            prepare<T, R>(points.data(), offsets + row * K * 2, logits + row * K, box, shapes, n);
            std::fill(o, o + D, T(0));
            for (int64_t k = 0; k < K; k++) {
                const Point<T> &p = points[k];
                for (int c = 0; c < 4; c++) {
                    if (!p.has(c)) continue;
                    const T *v = values + p.token(c, shapes[2 * (k / n.P) + 1]) * stride, scale = p.weight * p.bilinear(c);
                    for (int64_t d = 0; d < D; d++) o[d] += scale * v[d];
                }
            }
            std::copy(o, o + D, out + row * D);
        }
    }
}

template <typename T, int R, int FIXED>
void backward(const T *grad_out, const T *value, const T *offsets, const T *logits, const T *reference, T *grad_value,
              T *grad_offsets, T *grad_logits, T *grad_reference, const int64_t *shapes, Sizes n) {
    const int64_t K = n.L * n.P, D = FIXED ? FIXED : n.D, stride = n.M * D;
#pragma omp parallel for
    for (int64_t pair = 0; pair < n.B * n.M; pair++) {
        std::vector<Point<T>> points(K);
        const int64_t b = pair / n.M, m = pair % n.M, at = b * n.S * stride + m * D;
        for (int64_t q = 0; q < n.Q; q++) {
            const int64_t row = (b * n.Q + q) * n.M + m;
            const T *box = reference + (b * n.Q + q) * n.L * R, *g = grad_out + row * D;
            prepare<T, R>(points.data(), offsets + row * K * 2, logits + row * K, box, shapes, n);
            T mean = 0;
            for (int64_t k = 0; k < K; k++) {
                const Point<T> &p = points[k];
                const int64_t l = k / n.P;
                Flow<T> flow = {0, 0, 0};
                for (int c = 0; c < 4; c++) {
                    if (!p.has(c)) continue;
                    const int64_t token = at + p.token(c, shapes[2 * l + 1]) * stride;
                    const T *v = value + token, scale = p.weight * p.bilinear(c);
                    T *gv = grad_value + token, dot = 0;
#pragma omp simd reduction(+ : dot)
                    for (int64_t d = 0; d < D; d++) {
                        dot += g[d] * v[d];
                        gv[d] += scale * g[d];
                    }
                    flow.add(p, c, dot);
                }
                for (int axis = 0; axis < 2; axis++) {
                    const int size = shapes[2 * l + 1 - axis];
                    const T grad_pixel = (axis ? flow.y : flow.x) * p.weight;
                    const int64_t i = (row * K + k) * 2 + axis;
                    grad_offsets[i] = flow_to_offset<T, R>(grad_pixel, box + l * R, axis, size, n.P);
                    if (grad_reference) {
                        T *to = grad_reference + ((pair * n.Q + q) * n.L + l) * R;
                        flow_to_reference<T, R>(grad_pixel, offsets[i], axis, size, n.P, [&](int of, T x) { to[of] += x; });
                    }
                }
                grad_logits[row * K + k] = flow.weight;
                mean += p.weight * flow.weight;
            }
            // Softmax, backwards: dL/dlogit_k = a_k (dL/da_k - sum_j a_j dL/da_j).
            for (int64_t k = 0; k < K; k++) grad_logits[row * K + k] = points[k].weight * (grad_logits[row * K + k] - mean);
        }
    }
}

// The published models have 32 channels a head, the small ones 16.
#define BY_CHANNELS(function, T, R) (D == 32 ? function<T, R, 32> : D == 16 ? function<T, R, 16> : function<T, R, 0>)
#define EXPORT(T, name, R)                                                                                               \
    extern "C" void forward_##name##_##R(const T *v, const T *x, const T *a, const T *r, T *o, const int64_t *shapes,    \
                                         int64_t B, int64_t S, int64_t M, int64_t D, int64_t Q, int64_t L, int64_t P) {  \
        BY_CHANNELS(forward, T, R)(v, x, a, r, o, shapes, {B, S, M, D, Q, L, P});                                        \
    }                                                                                                                    \
    extern "C" void backward_##name##_##R(const T *g, const T *v, const T *x, const T *a, const T *r, T *gv, T *gx, T *ga,\
                                          T *gr, const int64_t *shapes, int64_t B, int64_t S, int64_t M, int64_t D,      \
                                          int64_t Q, int64_t L, int64_t P) {                                             \
        BY_CHANNELS(backward, T, R)(g, v, x, a, r, gv, gx, ga, gr, shapes, {B, S, M, D, Q, L, P});                       \
    }
EXPORT(float, float32, 2)
EXPORT(float, float32, 4)
EXPORT(double, float64, 2)
EXPORT(double, float64, 4)
