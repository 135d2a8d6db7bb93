// A sampling point of deformable attention (Zhu et al. 2021, Eq. 3), for msda.cu and cpu.cpp: where
// it falls, which corners it reads, and what flows back through it. A is float or double.

// A point in its level's map: (fx, fy) is its place between four corners; `code` is 16 times the
// token of the upper left one (which may lie outside, even below 0) plus a bit for every corner c
// that exists: c & 1 is the right column, c & 2 the lower row. No corner outside the map is read.
template <typename A>
struct alignas(4 * sizeof(A)) Point {  // one 16-byte access in float
    A fx, fy, weight;
    int code;

    __device__ bool has(int c) const { return code >> c & 1; }
    __device__ int token(int c, int w) const { return (code >> 4) + (c & 1) + (c >> 1) * w; }
    __device__ A bilinear(int c) const { return (c & 1 ? fx : 1 - fx) * (c & 2 ? fy : 1 - fy); }
};

// Pixels that one unit of offset moves a point along an axis (0: x, 1: y) of `size` cells: around a
// reference point a cell; around a box (R = 4) P offsets span half of it: offset / P * (w, h) / 2.
template <typename A, int R>
__device__ A step(const A *reference, int axis, int size, int P) {
    if (R == 2) return 1;
    return reference[R - 2 + axis] * size * (A(0.5) / P);
}

// The place of a point in pixels; pixel 0's centre is 0. Multiplied out, it rounds less.
template <typename A, int R>
__device__ A pixel(const A *reference, A offset, int axis, int size, int P) {
    return reference[axis] * size + offset * step<A, R>(reference, axis, size, P) - A(0.5);
}

template <typename A>
__device__ Point<A> locate(A x, A y, A weight, int h, int w, int start) {
    Point<A> p = {0, 0, weight, 0};
    if (!(x > -1 && y > -1 && x < w && y < h)) return p;  // outside, or NaN: no corner exists
    int x0 = (int)x, y0 = (int)y;
    x0 -= x < x0, y0 -= y < y0;  // towards -1, as floor
    p.fx = x - x0, p.fy = y - y0;
    const int columns = (x0 >= 0) + 2 * (x0 + 1 < w);
    p.code = (start + y0 * w + x0) * 16 + (y0 >= 0 ? columns : 0) + (y0 + 1 < h ? 4 * columns : 0);
    return p;
}

// What flows back to a point's attention weight, x and y: sums over corners of `dot`, which is
// <output's gradient, value>, times how the corner's share depends on them.
template <typename A>
struct Flow {
    A weight, x, y;

    __device__ void add(const Point<A> &p, int c, A dot) {
        weight += dot * p.bilinear(c);
        x += dot * (c & 1 ? 1 : -1) * (c & 2 ? p.fy : 1 - p.fy);
        y += dot * (c & 2 ? 1 : -1) * (c & 1 ? p.fx : 1 - p.fx);
    }
};

// From the gradient of a point's pixel to that of its offset, and of its reference, by add(index,
// amount). A point that reads nothing sends nothing back, though its offset be infinite or NaN.
template <typename A, int R>
__device__ A flow_to_offset(A grad_pixel, const A *reference, int axis, int size, int P) {
    return grad_pixel == 0 ? 0 : grad_pixel * step<A, R>(reference, axis, size, P);
}

template <typename A, int R, typename Add>
__device__ void flow_to_reference(A grad_pixel, A offset, int axis, int size, int P, Add add) {
    if (grad_pixel == 0) return;
    add(axis, grad_pixel * size);
    if (R == 4) add(R - 2 + axis, grad_pixel * offset * size * (A(0.5) / P));
}
