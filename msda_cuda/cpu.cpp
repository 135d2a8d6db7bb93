// Multi-scale deformable attention on a CPU, forward and backward: Zhu et al. 2021, Eq. 3, one point at a time.
//
// Compiled by cpu.py at first use. A call handles the (image, head) pairs [first, last); calls on disjoint ranges write
// to disjoint memory, so that Python threads can run them side by side (ctypes lets go of the interpreter's lock), and
// the result does not depend on how many there are.
//
//   value [B, S, M, D]   shapes [L, 2] (h, w)   locations [B, Q, M, L, P, 2] (x, y)   weights [B, Q, M, L, P]
//   out   [B, Q, M, D]   and each gradient as what it is the gradient of; grad_value comes zeroed
#include <cmath>
#include <cstdint>

// The four corners around a point: bilinear weight, its derivatives in pixels, and the row; outside there is no row.
template <typename T>
struct Corners {
    T weight[4], dx[4], dy[4];
    int64_t row[4];
    int count = 0;

    Corners(T x, T y, int64_t h, int64_t w) {              // x, y in pixels; pixel 0's centre is 0
        if (!(x > -1 && y > -1 && x < w && y < h)) return;    // far outside, or NaN: nothing to read
        const int64_t x0 = (int64_t)std::floor(x), y0 = (int64_t)std::floor(y);
        const T fx = x - x0, fy = y - y0;
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 2; i++) {
                const int64_t cx = x0 + i, cy = y0 + j;
                if (cx < 0 || cy < 0 || cx >= w || cy >= h) continue;
                const T wx = i ? fx : 1 - fx, wy = j ? fy : 1 - fy;
                weight[count] = wx * wy;
                dx[count] = i ? wy : -wy;
                dy[count] = j ? wx : -wx;
                row[count++] = cy * w + cx;
            }
    }
};

template <typename T>
void forward(const T *value, const int64_t *shapes, const T *locations, const T *weights, T *out, int64_t S, int64_t M,
             int64_t D, int64_t Q, int64_t L, int64_t P, int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; pair++) {
        const int64_t b = pair / M, m = pair % M;
        for (int64_t q = 0; q < Q; q++) {
            const int64_t at = ((b * Q + q) * M + m);
            T *o = out + at * D;
            for (int64_t d = 0; d < D; d++) o[d] = 0;
            const T *level = value + (b * S * M + m) * D;
            for (int64_t l = 0; l < L; l++) {
                const int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
                for (int64_t p = 0; p < P; p++) {
                    const int64_t k = (at * L + l) * P + p;
                    const Corners<T> c(locations[2 * k] * w - T(0.5), locations[2 * k + 1] * h - T(0.5), h, w);
                    for (int n = 0; n < c.count; n++) {
                        const T *v = level + c.row[n] * M * D, scale = c.weight[n] * weights[k];
                        for (int64_t d = 0; d < D; d++) o[d] += scale * v[d];
                    }
                }
                level += h * w * M * D;
            }
        }
    }
}

template <typename T>
void backward(const T *value, const int64_t *shapes, const T *locations, const T *weights, const T *grad_out,
              T *grad_value, T *grad_locations, T *grad_weights, int64_t S, int64_t M, int64_t D, int64_t Q, int64_t L,
              int64_t P, int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; pair++) {
        const int64_t b = pair / M, m = pair % M;
        for (int64_t q = 0; q < Q; q++) {
            const int64_t at = ((b * Q + q) * M + m);
            const T *g = grad_out + at * D;
            int64_t level = (b * S * M + m) * D;
            for (int64_t l = 0; l < L; l++) {
                const int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
                for (int64_t p = 0; p < P; p++) {
                    const int64_t k = (at * L + l) * P + p;
                    const Corners<T> c(locations[2 * k] * w - T(0.5), locations[2 * k + 1] * h - T(0.5), h, w);
                    T sum = 0, sum_x = 0, sum_y = 0;
                    for (int n = 0; n < c.count; n++) {
                        const T *v = value + level + c.row[n] * M * D, scale = c.weight[n] * weights[k];
                        T *gv = grad_value + level + c.row[n] * M * D, dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int64_t d = 0; d < D; d++) {
                            dot += g[d] * v[d];
                            gv[d] += scale * g[d];
                        }
                        sum += dot * c.weight[n];
                        sum_x += dot * c.dx[n];
                        sum_y += dot * c.dy[n];
                    }
                    grad_weights[k] = sum;
                    grad_locations[2 * k] = sum_x * weights[k] * w;          // a location of 1 is w pixels away
                    grad_locations[2 * k + 1] = sum_y * weights[k] * h;
                }
                level += h * w * M * D;
            }
        }
    }
}

#define EXPORT(T, name)                                                                                               \
    extern "C" void forward_##name(const T *v, const int64_t *s, const T *x, const T *w, T *o, int64_t S, int64_t M,   \
                                   int64_t D, int64_t Q, int64_t L, int64_t P, int64_t first, int64_t last) {          \
        forward<T>(v, s, x, w, o, S, M, D, Q, L, P, first, last);                                                      \
    }                                                                                                                  \
    extern "C" void backward_##name(const T *v, const int64_t *s, const T *x, const T *w, const T *g, T *gv, T *gx,    \
                                    T *gw, int64_t S, int64_t M, int64_t D, int64_t Q, int64_t L, int64_t P,           \
                                    int64_t first, int64_t last) {                                                     \
        backward<T>(v, s, x, w, g, gv, gx, gw, S, M, D, Q, L, P, first, last);                                         \
    }
EXPORT(float, float32)
EXPORT(double, float64)
