// The arguments of the head, listed once: they come first in every operator, in this order. The
// schema of an operator, its parameters and the struct Head are made from this list. Python's list
// is the class Head of tvmf_ext/ops.py.
#pragma once

// X(type in C++, type in the schema, name). Tensors come first, so that autograd saves them as they
// stand.
#define TVMF_HEAD(X)                                                                   \
  X(Tensor, "Tensor", input)                   /* [N, D] */                            \
  X(Tensor, "Tensor", weight)                  /* [C, D] */                            \
  X(Tensor, "Tensor", target)                  /* [N] int64 */                         \
  X(OptionalTensor, "Tensor?", kappa)          /* [] or [1] or [C] */                  \
  X(OptionalTensor, "Tensor?", scale)          /* [] or [1] */                         \
  X(OptionalTensor, "Tensor?", bias)           /* [C] */                               \
  X(OptionalTensor, "Tensor?", prior)          /* [C] */                               \
  X(OptionalTensor, "Tensor?", class_weight)   /* [C] */                               \
  X(OptionalTensor, "Tensor?", cosine_margin)  /* [] or [1] or [C] */                  \
  X(OptionalTensor, "Tensor?", angular_margin) /* [] or [1] or [C] */                  \
  X(OptionalTensor, "Tensor?", target_score)   /* [N], of row statistics of a shard */ \
  X(double, "float", kappa_value)              /* where kappa is absent */             \
  X(double, "float", scale_value)              /* where scale is absent */             \
  X(double, "float", cosine_margin_value)      /* where cosine_margin is absent */     \
  X(double, "float", angular_margin_value)     /* where angular_margin is absent */    \
  X(bool, "bool", softplus_scale)              /* the scale is softplus(scale) + 1 */  \
  X(int64_t, "int", ignore_index)                                                      \
  X(bool, "bool", allow_tf32) /* CUDA may round float32 products to TF32 */

#define TVMF_AS_FIELD(type, schema, name) type name;
#define TVMF_AS_PARAMETER(type, schema, name) type name,
#define TVMF_AS_ARGUMENT(type, schema, name) std::move(name),
#define TVMF_AS_SCHEMA(type, schema, name) schema " " #name ", "

// Each ends in a comma: an operator's own arguments follow.
#define TVMF_HEAD_PARAMETERS TVMF_HEAD(TVMF_AS_PARAMETER)
#define TVMF_HEAD_SCHEMA TVMF_HEAD(TVMF_AS_SCHEMA)
