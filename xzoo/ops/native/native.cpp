// The kernels of the `native` backend: float32, sums in float32, each mirrored by a function of
// dense.py.
//
// Built by native.py without torch's and without OpenMP's headers; called through the C functions
// at the end. A layer is weight [O][degree][taps] and neighbours [O / share][degree]; an activation
// is [N][C][H][W], or [N][H][W][C] where the flag `last` says so; both orders are read and written
// as they lie.
//
//   3x3, many samples    lanes = samples; a tile of pixels of one output stays in registers over
//                        its whole degree, and each loaded vector of inputs feeds up to nine
//                        products
//   3x3, few samples     lanes = pixels of a row, or of a plane
//   1x1 and linear       lanes = columns (pixels of all samples), copied to panels that fit in the
//                        L2 cache; with share 1 also taken by blocks of channels that fit in L1
//   linear, few samples  lanes = weights of an output
//
// Work is split over threads by samples and outputs, never within a sum: the bits do not depend on
// the threads.

#include "conv3_pixels.h"
#include "conv3_samples.h"
#include "gradients.h"
#include "layer.h"
#include "memory.h"
#include "norms.h"
#include "panels.h"
#include "point.h"
#include "threads.h"
#include "vectors.h"

#include <type_traits>

namespace {

// ---- what is asked of them, before any address is made of it

enum Answer { DONE, BAD_NEIGHBOUR, NO_MEMORY, BAD_SIZES };  // native.py's

// Sizes that are a layer's. None is divided by, or counted to, that was not looked at: edges and
// inputs are numbered in 32 bits, and 2^44 numbers leave room for every product of sizes in 64.
bool is_layer(const Layer& a) {
  const long limit = INT32_MAX;
  if (a.N < 0 || a.H < 0 || a.W < 0 || a.C < 1 || a.O < 1 || a.degree < 1 || a.share < 1 ||
      a.threads < 1)
    return false;
  if (a.O % a.share || a.stride < 1 || a.stride > 2 || a.activation < 0 || a.activation > 2)
    return false;
  if (a.C > limit || a.O > limit || a.degree > limit / a.O) return false;
  return (double)a.N * (double)a.H * (double)a.W * (double)most(a.C, a.O) <= 0x1p44;
}

// An index out of range would read memory that is not the input's.
bool in_range(const Layer& a, const int32_t* neighbours) {
  uint32_t bad = 0;
  for (long i = 0; i < a.O / a.share * a.degree; i++)
    bad |= (uint32_t)neighbours[i] >= (uint32_t)a.C;
  return !bad;
}

Answer begun(const Layer& a, const int32_t* neighbours) {
  no_memory = false;
  if (!is_layer(a)) return BAD_SIZES;
  return in_range(a, neighbours) ? DONE : BAD_NEIGHBOUR;
}
Answer ended() { return no_memory ? NO_MEMORY : DONE; }

bool is_norm(const Norm& a) {
  if (a.N < 1 || a.P < 1 || a.C < 1 || a.threads < 1 || a.activation < NONE || a.activation > GELU)
    return false;
  return (double)a.N * (double)a.P * (double)a.C <= 0x1p44;
}

template <class F>
void with_activation(const Norm& a, F f) {
  switch (a.activation) {
    case RELU: return f(std::integral_constant<int, RELU>());
    case RELU6: return f(std::integral_constant<int, RELU6>());
    case GELU: return f(std::integral_constant<int, GELU>());
    default: return f(std::integral_constant<int, NONE>());
  }
}

// No sample, or no pixel: no sum to make.
bool is_empty(const Layer& a) { return !a.N || !a.H || !a.W; }

}  // namespace

// ---- what native.py calls; each returns an Answer

extern "C" {

void xzoo_init(void* start_, void* thread_number_, void* thread_count_, void* inside_) {
  pthread_atfork(nullptr, nullptr, [] { forked = 1; });
  thread_number = (int (*)())thread_number_;
  thread_count = (int (*)())thread_count_;
  inside = (int (*)())inside_;
  start = (void (*)(void (*)(void*), void*, unsigned, unsigned))start_;
}

int xzoo_lanes() { return VL; }

int xzoo_fast() { return FAST; }

int xzoo_conv3(const Layer* a, const float* x, const float* w, const int32_t* neighbours,
               const float* bias, float* y) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  const Edges e{neighbours, w, a->degree, a->share, nullptr};
  const long Ho = (a->H - 1) / 2 + 1, Wo = (a->W - 1) / 2 + 1;
  if (a->stride == 1) stride_one(x, *a, e, bias, y);
  else if (2 * a->N <= VL) by_rows<2>(x, *a, e, bias, y);
  else
    by_samples<2>(x, e, bias, y, a->N, a->C, a->H, a->W, a->O, Ho, Wo, a->x_last, a->y_last,
                  a->threads, range(*a));
  return ended();
}

int xzoo_conv3_input_grad(const Layer* a, const float* d, const float* w, const int32_t* neighbours,
                          float* dx) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  const Layer t{a->N, a->O, a->H, a->W, a->C, 0, 1, 1, a->y_last, a->x_last, a->threads, 0};
  // Of stride 2, by_samples leaves out three of four products; the others multiply with zeros.
  const bool spread =
      a->stride == 2 && 4 * least(row_cost(t), a->N * plane_cost(a->H, a->W)) < sample_cost(t);
  const Edges e = transposed(*a, neighbours, w, a->stride == 1 || spread);
  const float* from = spread ? spread_out(d, *a) : d;
  if (no_memory) return NO_MEMORY;
  if (a->stride == 1 || spread) stride_one(from, t, e, nullptr, dx);
  else
    by_samples<-2>(d, e, nullptr, dx, a->N, a->O, (a->H - 1) / 2 + 1, (a->W - 1) / 2 + 1, a->C,
                   a->H, a->W, a->y_last, a->x_last, a->threads);
  return ended();
}

int xzoo_conv3_weight_grad(const Layer* a, const float* d, const float* x,
                           const int32_t* neighbours, float* dw) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return memset(dw, 0, a->O * a->degree * 9 * sizeof(float)), DONE;
  const Layer t{a->N, a->C, (a->H - 1) / a->stride + 1, (a->W - 1) / a->stride + 1};
  if (2 * a->N <= VL && row_cost(t) < sample_cost(t))
    a->stride == 1 ? weights_by_rows<1>(x, d, *a, neighbours, dw)
                   : weights_by_rows<2>(x, d, *a, neighbours, dw);
  else
    a->stride == 1 ? weights3<1>(x, d, *a, neighbours, dw) : weights3<2>(x, d, *a, neighbours, dw);
  return ended();
}

int xzoo_point(const Layer* a, const float* x, const float* w, const int32_t* neighbours,
               const float* bias, float* y) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  const Edges e{neighbours, w, a->degree, a->share, nullptr};
  const long columns = a->N * a->H * a->W;
  if (a->H * a->W == 1 && a->N <= FEW) by_dots(x, *a, e, bias, y);
  else if (a->share >= 4) {
    switch (panel_vectors(columns, {WIDE ? 5 : 3, 2})) {
      case 5: by_panels<5>(x, *a, e, bias, y); break;
      case 3: by_panels<3>(x, *a, e, bias, y); break;
      case 2: by_panels<2>(x, *a, e, bias, y); break;
      default: by_panels<1>(x, *a, e, bias, y);
    }
  } else {
    switch (panel_vectors(columns, {WIDE ? 7 : a->share == 1 ? 8 : 5, 4, 2})) {
      case 8: by_panels<8>(x, *a, e, bias, y); break;
      case 7: by_panels<7>(x, *a, e, bias, y); break;
      case 5: by_panels<5>(x, *a, e, bias, y); break;
      case 4: by_panels<4>(x, *a, e, bias, y); break;
      case 2: by_panels<2>(x, *a, e, bias, y); break;
      default: by_panels<1>(x, *a, e, bias, y);
    }
  }
  return ended();
}

int xzoo_point_input_grad(const Layer* a, const float* d, const float* w, const int32_t* neighbours,
                          float* dx) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  if (a->H * a->W == 1 && a->N <= FEW) {
    inputs_by_dots(d, *a, neighbours, w, dx);
    return ended();
  }
  const long columns = a->N * a->H * a->W;
  if (a->share < (WIDE ? 4 : 2)) {
    switch (panel_vectors(columns, {WIDE ? 7 : 8, 4, 2})) {
      case 8: by_edges<8>(d, *a, neighbours, w, dx); break;
      case 7: by_edges<7>(d, *a, neighbours, w, dx); break;
      case 4: by_edges<4>(d, *a, neighbours, w, dx); break;
      case 2: by_edges<2>(d, *a, neighbours, w, dx); break;
      default: by_edges<1>(d, *a, neighbours, w, dx);
    }
    return ended();
  }
  if (columns > 2 * VL) by_groups<WIDE ? 4 : 3>(d, *a, neighbours, w, dx);
  else if (columns > VL) by_groups<2>(d, *a, neighbours, w, dx);
  else by_groups<1>(d, *a, neighbours, w, dx);
  return ended();
}

int xzoo_point_weight_grad(const Layer* a, const float* d, const float* x,
                           const int32_t* neighbours, float* dw) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return memset(dw, 0, a->O * a->degree * sizeof(float)), DONE;
  if (a->H * a->W == 1 && a->N <= FEW) weights_by_dots(x, d, *a, neighbours, dw);
  else weights1(x, d, *a, neighbours, dw);
  return ended();
}

int xzoo_norm(const Norm* a, const float* x, const float* gamma, const float* beta,
              float* running_mean, float* running_var, float* statistics, float* y) {
  no_memory = false;
  if (!is_norm(*a)) return BAD_SIZES;
  const Statistics s{statistics, statistics + a->C, statistics + 2 * a->C, statistics + 3 * a->C};
  with_activation(*a, [&](auto act) {
    constexpr int A = decltype(act)::value;
    if (a->training)
      return normed_by_batch<A>(*a, x, gamma, beta, running_mean, running_var, s, y);
    for (long c = 0; c < a->C; c++) s.set(c, running_mean[c], running_var[c], a->eps, gamma, beta);
    normed<A>(*a, x, s, y);
  });
  return ended();
}

int xzoo_norm_grad(const Norm* a, const float* dy, const float* x, float* statistics, float* dgamma,
                   float* dbeta, float* dx) {
  no_memory = false;
  if (!is_norm(*a)) return BAD_SIZES;
  const Statistics s{statistics, statistics + a->C, statistics + 2 * a->C, statistics + 3 * a->C};
  float* slope = scratch[1].floats(2 * a->C);
  if (no_memory) return NO_MEMORY;
  with_activation(*a, [&](auto act) {
    constexpr int A = decltype(act)::value;
    float* level = slope + a->C;
    if (a->training) norm_gradients<A, true>(*a, dy, x, s, slope, level, dx, dgamma, dbeta);
    else norm_gradients<A, false>(*a, dy, x, s, slope, level, dx, dgamma, dbeta);
  });
  return ended();
}
}
