// One sampling point of multi-scale deformable attention (Zhu et al. 2021, Eq. 3): where it falls, which corners it
// reads, and what flows back through it. The CUDA kernel (msda.cu) and the CPU's code (cpu.cpp) both compute with these
// functions, so that what is tested on a CPU is what runs on a GPU. A is float or double.
#pragma once
#ifdef __CUDACC__
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif

// A point in its level's map. (fx, fy) is its place between the four corners; `code` is 16 times the token of the upper
// left corner (it may lie outside, even below token 0) plus a bit for every corner c that exists: c & 1 is the right
// column, c & 2 the lower row. A corner outside is never read: what is stored next to the map may be anything.
template <typename A>
struct alignas(4 * sizeof(A)) Point {                                               // one 16-byte access in float
    A fx, fy, weight;
    int code;

    BOTH bool has(int c) const { return code >> c & 1; }
    BOTH long long token(int c, int w) const { return (code >> 4) + (c & 1) + (c >> 1) * w; }
    BOTH A bilinear(int c) const { return (c & 1 ? fx : 1 - fx) * (c & 2 ? fy : 1 - fy); }
};

// Pixels that one unit of offset moves a point along an axis (0: x, 1: y) of `size` cells. Around a reference point an
// offset counts cells; around a box (R = 4) P offsets span half of it: offset / P * (w, h) / 2.
template <typename A, int R>
BOTH A step(const A *reference, int axis, int size, int P) {
    if (R == 2) return 1;
    return reference[R - 2 + axis] * size * (A(0.5) / P);
}

// The place of a point in pixels; pixel 0's centre is 0. (Multiplied out, since reference + offset / size would round
// twice to a fraction of the whole map.)
template <typename A, int R>
BOTH A pixel(const A *reference, A offset, int axis, int size, int P) {
    return reference[axis] * size + offset * step<A, R>(reference, axis, size, P) - A(0.5);
}

template <typename A>
BOTH Point<A> locate(A x, A y, A weight, int h, int w, int start) {
    Point<A> p = {0, 0, weight, 0};
    if (!(x > -1 && y > -1 && x < w && y < h)) return p;                         // far outside, or NaN: no corner exists
    int x0 = (int)x, y0 = (int)y;
    x0 -= x < x0, y0 -= y < y0;                                                    // towards -1, as floor
    p.fx = x - x0, p.fy = y - y0;
    const int columns = (x0 >= 0) + 2 * (x0 + 1 < w);
    p.code = (start + y0 * w + x0) * 16 + (y0 >= 0 ? columns : 0) + (y0 + 1 < h ? 4 * columns : 0);
    return p;
}

// What flows back through a point: sums over corners and channels of <gradient of the output, value> times how the
// corner's bilinear weight depends on the attention weight, and on the pixel's x and y.
template <typename A>
struct Flow {
    A weight, x, y;

    BOTH void add(const Point<A> &p, int c, A dot) {
        weight += dot * p.bilinear(c);
        x += dot * (c & 1 ? 1 : -1) * (c & 2 ? p.fy : 1 - p.fy);
        y += dot * (c & 2 ? 1 : -1) * (c & 1 ? p.fx : 1 - p.fx);
    }
};

// From the gradient of a point's pixel to that of its offset, and of its reference, by add(index, amount). A point that
// reads nothing sends nothing back, though its offset or its reference be infinite or NaN.
template <typename A, int R>
BOTH A flow_to_offset(A grad_pixel, const A *reference, int axis, int size, int P) {
    return grad_pixel == 0 ? 0 : grad_pixel * step<A, R>(reference, axis, size, P);
}

template <typename A, int R, typename Add>
BOTH void flow_to_reference(A grad_pixel, A offset, int axis, int size, int P, Add add) {
    if (grad_pixel == 0) return;
    add(axis, grad_pixel * size);
    if (R == 4) add(R - 2 + axis, grad_pixel * offset * size * (A(0.5) / P));
}
