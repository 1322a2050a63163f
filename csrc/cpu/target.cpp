#include "cpu/target.h"

#include "cpu/isa.h"

namespace tvmf::cpu {

template <class T>
void target_logits(const Call<T>& call, const Matrix<T>& x, Rows<T>& weight, const Saved<T>& saved,
                   T* score) {
  constexpr int64_t kGathered = 256;  // rows of the weight that are converted together
  const auto& kernels = tile_kernels<T>();
  const int64_t N = call.N, D = call.D;
  std::vector<int64_t> row(N);  // of the target's weight, in the matrix `w`
  for (int64_t begin = 0; begin < N; begin += kGathered) {
    const int64_t count = std::min(kGathered, N - begin);
    Matrix<T> w;
    Tensor gathered;
    for (int64_t n = begin; n < begin + count; ++n) row[n] = std::max<int64_t>(call.label[n], 0);
    if (weight.direct()) {
      w = weight.block(0, call.C);
    } else {
      gathered = weight.gathered(row.data() + begin, count);
      w = {data<T>(gathered), count, D, D};
      for (int64_t i = 0; i < count; ++i) row[begin + i] = i;
    }
    parallel_rows(count, D, [&](int64_t first, int64_t last) {
      for (int64_t n = begin + first; n < begin + last; ++n) {
        const int64_t y = call.label[n];
        saved.target_cosine[n] = saved.target_logit[n] = score[n] = 0;
        if (y < 0) continue;
        const T* target_weight = w.data + row[n] * w.row_stride;
        const auto [product, cosine] = kernels.target(x.data + n * x.row_stride, target_weight, D);
        saved.target_cosine[n] = T(cosine);
        saved.target_logit[n] = T(target_logit(cosine, call.terms.of_target(y)).value);
        T weight_rnorm;
        kernels.rnorm(target_weight, w.row_stride, 1, D, &weight_rnorm);
        score[n] = kernels.score(T(product), saved.x_rnorm[n], weight_rnorm, call.terms.kappa[y],
                                 call.terms.bias[y]);
      }
    });
  }
  if (call.head.target_score) {
    const int64_t stride = call.head.target_score->stride(0);
    const T* given = data<T>(*call.head.target_score);
    for (int64_t n = 0; n < N; ++n) score[n] = given[n * stride];
  }
}

template void target_logits(const Call<float>&, const Matrix<float>&, Rows<float>&,
                            const Saved<float>&, float*);
template void target_logits(const Call<double>&, const Matrix<double>&, Rows<double>&,
                            const Saved<double>&, double*);

}  // namespace tvmf::cpu
