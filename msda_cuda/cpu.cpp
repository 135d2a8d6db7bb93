// Multi-scale deformable attention on a CPU, point by point, with msda.cu's arithmetic. Compiled by
// cpu.py at first use. Threads share out the (image, head) pairs, which write to disjoint memory:
// the result does not depend on how many there are.
// All is laid out as in msda.cu, but for shapes, [L, 2], and grad_reference (or null), of each head
// its own: [B, M, Q, L, R]. It and grad_value come zeroed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#define __device__  // which sampling.h has for CUDA
#include "sampling.h"

struct Sizes { int64_t B, S, M, D, Q, L, P; };

// Softmax over the points of one (query, head), and where each of them falls.
template <typename T, int R>
void prepare(Point<T> *points, const T *offsets, const T *logits, const T *reference,
             const int64_t *shapes, const Sizes &n) {
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

// FIXED: D where it is known when this is compiled, so that a query's sum stays in registers, or 0.
template <typename T, int R, int FIXED>
void forward(T **a, const int64_t *shapes, Sizes n) {
    const T *value = a[0], *offsets = a[1], *logits = a[2], *reference = a[3];
    T *out = a[4];
    const int64_t K = n.L * n.P, D = FIXED ? FIXED : n.D, stride = n.M * D;
#pragma omp parallel for
    for (int64_t pair = 0; pair < n.B * n.M; pair++) {
        std::vector<Point<T>> points(K);
        const int64_t b = pair / n.M, m = pair % n.M;
        const T *values = value + b * n.S * stride + m * D;
        for (int64_t q = 0; q < n.Q; q++) {
            const int64_t row = (b * n.Q + q) * n.M + m;
            const T *box = reference + (b * n.Q + q) * n.L * R;
            prepare<T, R>(points.data(), offsets + row * K * 2, logits + row * K, box, shapes, n);
            T fixed[FIXED + 1], *const o = FIXED ? fixed : out + row * D;
            std::fill(o, o + D, T(0));
            for (int64_t k = 0; k < K; k++) {
                const Point<T> &p = points[k];
                for (int c = 0; c < 4; c++) {
                    if (!p.has(c)) continue;
                    const T *v = values + p.token(c, shapes[2 * (k / n.P) + 1]) * stride;
                    const T scale = p.weight * p.bilinear(c);
                    for (int64_t d = 0; d < D; d++) o[d] += scale * v[d];
                }
            }
            if (FIXED) std::copy(o, o + D, out + row * D);
        }
    }
}

template <typename T, int R, int FIXED>
void backward(T **a, const int64_t *shapes, Sizes n) {
    const T *value = a[0], *offsets = a[1], *logits = a[2], *reference = a[3], *grad_out = a[4];
    T *grad_value = a[5], *grad_offsets = a[6], *grad_logits = a[7], *grad_reference = a[8];
    const int64_t K = n.L * n.P, D = FIXED ? FIXED : n.D, stride = n.M * D;
#pragma omp parallel for
    for (int64_t pair = 0; pair < n.B * n.M; pair++) {
        std::vector<Point<T>> points(K);
        const int64_t b = pair / n.M, m = pair % n.M, at = b * n.S * stride + m * D;
        for (int64_t q = 0; q < n.Q; q++) {
            const int64_t row = (b * n.Q + q) * n.M + m;
            const T *box = reference + (b * n.Q + q) * n.L * R, *g = grad_out + row * D;
            prepare<T, R>(points.data(), offsets + row * K * 2, logits + row * K, box, shapes, n);
            T mean = 0, *const of_logit = grad_logits + row * K;
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
                    const T *from = box + l * R;
                    grad_offsets[i] = flow_to_offset<T, R>(grad_pixel, from, axis, size, n.P);
                    if (!grad_reference) continue;
                    T *to = grad_reference + ((pair * n.Q + q) * n.L + l) * R;
                    flow_to_reference<T, R>(grad_pixel, offsets[i], axis, size, n.P,
                                            [&](int of, T x) { to[of] += x; });
                }
                of_logit[k] = flow.weight;
                mean += p.weight * flow.weight;
            }
            // Softmax, backwards: dL/dlogit_k = a_k (dL/da_k - sum_j a_j dL/da_j).
            for (int64_t k = 0; k < K; k++) of_logit[k] = points[k].weight * (of_logit[k] - mean);
        }
    }
}

// The published models have 32 channels a head, the small ones 16.
#define EXPORT(name, T, R) \
    extern "C" void name##_##T##_##R(T **a, const int64_t *shapes, const Sizes &n) { \
        (n.D == 32 ? name<T, R, 32> : n.D == 16 ? name<T, R, 16> : name<T, R, 0>)(a, shapes, n); \
    }
EXPORT(forward, float, 2) EXPORT(forward, float, 4)
EXPORT(forward, double, 2) EXPORT(forward, double, 4)
EXPORT(backward, float, 2) EXPORT(backward, float, 4)
EXPORT(backward, double, 2) EXPORT(backward, double, 4)
