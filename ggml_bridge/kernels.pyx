# cython: language_level=3, cdivision=True
"""The project's compiled kernels as nodes of a ggml graph: capsules for `Graph.custom`.

The arithmetic is in toy/_kernels; here a callback reads pointers, shapes and strides out of ggml's tensors and hands over
slice `ith` of `nth`, on the kernels' own threads (`POOL`). CPU only. Matrices may be columns of a wider one wherever the kernels
allow it. Whether tensors fit each other is for those to check who record a node (toy/ops/graph/cpu.py).

`compute(graph)` runs a graph with BLAS held to one thread, which these nodes need: ggml's threads are the threads.
"""

import struct

from libc.stdint cimport int32_t, int64_t

from ggml_bridge.kernel cimport ggml_tensor, kernel_capsule, runner_capsule, slice_t
from toy._kernels cimport blas
from toy._kernels.attention cimport Attention, attention_backward_, attention_forward, attention_scratch
from toy._kernels.elementwise cimport Elementwise, elementwise_kernel
from toy._kernels.embedding cimport Embedding, Rope, embedding_backward_, embedding_forward, rope_rotate
from toy._kernels.linear cimport Linear, LinearBackward, linear_backward_input, linear_backward_weight, linear_forward
from toy._kernels.loss cimport CrossEntropy, cross_entropy_backward_, cross_entropy_forward
from toy._kernels.norms cimport (
    Norm, NormBackward, layer_norm_backward_, layer_norm_forward, rms_norm_backward_, rms_norm_forward,
)
from toy._kernels.optimizer cimport AdamW, adamw_update
from toy._kernels.quantized cimport (
    QuantizedEmbedding, QuantizedLinear, QuantizedLinearBackward, block_type, quantized_embedding_forward,
    quantized_linear_backward_input, quantized_linear_forward, quantized_scratch_floats,
)
from toy._kernels.threads cimport Kernel, run, slice_start

from toy._kernels.quantized import TYPES as QUANTIZED_TYPES

cdef extern from "simd_math.h" nogil:
    double toy_sum_of_squares(const float* x, Py_ssize_t n)


# -- reading ggml's tensors (ne[0] is the last numpy axis; strides nb are in bytes) -----------------------------------------

cdef inline float* data(const ggml_tensor* t) noexcept nogil:
    return <float*> t.data

cdef inline float* data_or_null(const ggml_tensor* t) noexcept nogil:
    return <float*> t.data if t != NULL else NULL

cdef inline Py_ssize_t stride(const ggml_tensor* t) noexcept nogil:
    return <Py_ssize_t> (t.nb[1] // sizeof(float))

cdef inline Py_ssize_t stride_or_0(const ggml_tensor* t) noexcept nogil:
    return stride(t) if t != NULL else 0

cdef inline Py_ssize_t size_of(const ggml_tensor* t) noexcept nogil:
    return t.ne[0] * t.ne[1] * t.ne[2] * t.ne[3]


# -- integers: ggml has int32 indices, the kernels read int64 ----------------------------------------------------------------

cdef void widen_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef const int32_t* ids = <const int32_t*> dst.src[0].data
    cdef long long* wide = <long long*> dst.data
    cdef Py_ssize_t i
    if ith == 0:
        for i in range(dst.src[0].ne[0]):
            wide[i] = ids[i]


# -- embedding ------------------------------------------------------------------------------------------------------------

cdef void embedding_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Embedding a
    cdef const ggml_tensor* table = dst.src[1]
    a.n, a.columns, a.table_rows = dst.ne[1], dst.ne[0], table.ne[1]
    a.ids = <const long long*> dst.src[0].data
    a.table, a.d_table, a.d_rows = data(table), NULL, NULL
    a.rows, a.rows_stride = data(dst), stride(dst)
    embedding_forward(&a, ith, nth)


cdef void embedding_backward_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Embedding a  # dst is a view of d_table, src[0]
    cdef const ggml_tensor* d_rows = dst.src[2]
    a.n, a.columns, a.table_rows = d_rows.ne[1], dst.ne[0], dst.ne[1]
    a.ids = <const long long*> dst.src[1].data
    a.table, a.d_table, a.rows = NULL, data(dst), NULL
    a.d_rows, a.rows_stride = data(d_rows), stride(d_rows)
    embedding_backward_(&a, ith, nth)


# -- linear; params: the precision of the products (toy._kernels.products), see `precision` -------------------------------------

cdef void linear_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Linear a
    cdef const ggml_tensor* x = dst.src[0]
    cdef const ggml_tensor* weight = dst.src[1]
    a.n, a.n_in, a.n_out, a.precision = dst.ne[1], weight.ne[0], weight.ne[1], (<int64_t*> params)[0]
    a.x, a.x_stride = data(x), stride(x)
    a.weight, a.bias = data(weight), data_or_null(dst.src[2])
    a.y, a.y_stride = data(dst), stride(dst)
    linear_forward(&a, ith, nth)


cdef void linear_backward_input_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef LinearBackward a
    cdef const ggml_tensor* d_y = dst.src[0]
    cdef const ggml_tensor* weight = dst.src[1]
    a.n, a.n_in, a.n_out, a.precision = dst.ne[1], weight.ne[0], weight.ne[1], (<int64_t*> params)[0]
    a.d_y, a.d_y_stride = data(d_y), stride(d_y)
    a.x, a.x_stride = NULL, 0
    a.weight = data(weight)
    a.d_x, a.d_x_stride = data(dst), stride(dst)
    a.d_weight, a.d_bias, a.beta = NULL, NULL, 0
    linear_backward_input(&a, ith, nth)


cdef void linear_backward_weight_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef LinearBackward a
    cdef int first = (<int64_t*> params)[1]  # 0: dst is new; 1: dst is a view of d_weight, src[0], to add to
    cdef const ggml_tensor* d_y = dst.src[first]
    cdef const ggml_tensor* x = dst.src[first + 1]
    a.beta, a.precision = first, (<int64_t*> params)[0]
    a.n, a.n_in, a.n_out = d_y.ne[1], dst.ne[0], dst.ne[1]
    a.d_y, a.d_y_stride = data(d_y), stride(d_y)
    a.x, a.x_stride = data(x), stride(x)
    a.weight, a.d_x, a.d_x_stride = NULL, NULL, 0
    a.d_weight, a.d_bias = data(dst), data_or_null(dst.src[first + 2])
    linear_backward_weight(&a, ith, nth)


# -- the same with a frozen weight of a block type; params: the number of its type, of a product the precision too ------------

cdef void quantized_embedding_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef QuantizedEmbedding a
    a.n, a.columns = dst.ne[1], dst.ne[0]
    a.ids = <const long long*> dst.src[0].data
    a.table, a.type = <const unsigned char*> dst.src[1].data, block_type((<int64_t*> params)[0])
    a.rows, a.rows_stride = data(dst), stride(dst)
    quantized_embedding_forward(&a, ith, nth)


cdef void quantized_linear_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef QuantizedLinear a
    cdef const ggml_tensor* x = dst.src[0]
    cdef const ggml_tensor* weight = dst.src[1]
    a.n, a.n_in, a.n_out = dst.ne[1], weight.ne[0], weight.ne[1]
    a.x, a.x_stride = data(x), stride(x)
    a.weight, a.type = <const unsigned char*> weight.data, block_type((<int64_t*> params)[0])
    a.precision = (<int64_t*> params)[1]
    a.scratch, a.bias = data(dst.src[2]), data_or_null(dst.src[3])
    a.y, a.y_stride = data(dst), stride(dst)
    quantized_linear_forward(&a, ith, nth)


cdef void quantized_linear_backward_input_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef QuantizedLinearBackward a
    cdef const ggml_tensor* d_y = dst.src[0]
    cdef const ggml_tensor* weight = dst.src[1]
    a.n, a.n_in, a.n_out = dst.ne[1], weight.ne[0], weight.ne[1]
    a.d_y, a.d_y_stride = data(d_y), stride(d_y)
    a.weight, a.type = <const unsigned char*> weight.data, block_type((<int64_t*> params)[0])
    a.precision = (<int64_t*> params)[1]
    a.scratch = data(dst.src[2])
    a.d_x, a.d_x_stride = data(dst), stride(dst)
    quantized_linear_backward_input(&a, ith, nth)


# -- norms ----------------------------------------------------------------------------------------------------------------

cdef inline void fill_norm(Norm* a, ggml_tensor* dst, void* params) noexcept nogil:
    cdef const ggml_tensor* x = dst.src[0]
    a.rows, a.columns, a.eps = dst.ne[1], dst.ne[0], (<float*> params)[0]
    a.x, a.x_stride, a.gamma = data(x), stride(x), data(dst.src[1])
    a.rstd = data(dst.src[2])  # statistics: (2, rows), rstd first, then the mean
    a.mean = a.rstd + a.rows
    a.beta = data_or_null(dst.src[3])
    a.y, a.y_stride = data(dst), stride(dst)


cdef void rms_norm_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Norm a
    fill_norm(&a, dst, params)
    rms_norm_forward(&a, ith, nth)


cdef void layer_norm_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Norm a
    fill_norm(&a, dst, params)
    layer_norm_forward(&a, ith, nth)


cdef inline void fill_norm_backward(NormBackward* a, ggml_tensor* dst) noexcept nogil:
    cdef const ggml_tensor* d_y = dst.src[0]
    cdef const ggml_tensor* x = dst.src[1]
    a.rows, a.columns = dst.ne[1], dst.ne[0]
    a.d_y, a.d_y_stride, a.x, a.x_stride = data(d_y), stride(d_y), data(x), stride(x)
    a.gamma, a.rstd = data(dst.src[2]), data(dst.src[3])
    a.mean = a.rstd + a.rows
    a.d_x, a.d_x_stride = data(dst), stride(dst)
    a.partial_gamma, a.partial_beta = data_or_null(dst.src[4]), data_or_null(dst.src[5])


cdef void rms_norm_backward_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef NormBackward a
    fill_norm_backward(&a, dst)
    rms_norm_backward_(&a, ith, nth)


cdef void layer_norm_backward_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef NormBackward a
    fill_norm_backward(&a, dst)
    layer_norm_backward_(&a, ith, nth)


cdef void add_partials_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst (columns,) = its old value + the sum of the rows of src[1] (nth, columns)."""
    cdef const ggml_tensor* partials = dst.src[1]
    cdef Py_ssize_t columns = partials.ne[0], row, i
    cdef const float* part = data(partials)
    cdef float* total = data(dst)
    for row in range(partials.ne[1]):
        for i in range(slice_start(columns, 16, ith, nth), slice_start(columns, 16, ith + 1, nth)):
            total[i] += part[row * columns + i]


# -- elementwise: one node for all of them ----------------------------------------------------------------------------------

cdef struct ElementwiseNode:    # the params
    Kernel kernel
    int64_t is_backward
    double factor


cdef void elementwise_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """Forward: inputs a and, where there is one, b. Backward: d_y, a and b; dst has the gradients of a and b side by side."""
    cdef ElementwiseNode* node = <ElementwiseNode*> params
    cdef int first = 1 if node.is_backward else 0
    cdef const ggml_tensor* x = dst.src[first]
    cdef const ggml_tensor* y = dst.src[first + 1]
    cdef Elementwise a
    a.rows, a.columns = x.ne[1], x.ne[0]
    a.a, a.a_stride = data(x), stride(x)
    a.b, a.b_stride = data_or_null(y), stride_or_0(y)
    a.d_y, a.d_y_stride = NULL, 0
    if node.is_backward:
        a.d_y, a.d_y_stride = data(dst.src[0]), stride(dst.src[0])
    a.out, a.out_stride = data(dst), stride(dst)
    a.out2, a.out2_stride = a.out + a.columns, stride(dst)
    a.factor = node.factor
    node.kernel(&a, ith, nth)


# -- rope -----------------------------------------------------------------------------------------------------------------

cdef void rope_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Rope a
    cdef const ggml_tensor* x = dst.src[0]
    cdef const int64_t* numbers = <const int64_t*> params
    a.n, a.n_heads, a.d_head = x.ne[1], numbers[0], x.ne[0] // numbers[0]
    a.direction, a.halves = numbers[1], numbers[2]
    a.positions = <const long long*> dst.src[1].data
    a.cosines = data(dst.src[2])
    a.sines = data(dst.src[3])
    a.x, a.x_stride, a.y, a.y_stride = data(x), stride(x), data(dst), stride(dst)
    rope_rotate(&a, ith, nth)


# -- attention ------------------------------------------------------------------------------------------------------------

cdef inline void fill_attention(Attention* a, const int64_t* numbers, const ggml_tensor* q, const ggml_tensor* k,
                                const ggml_tensor* v) noexcept nogil:
    a.batch, a.n_heads, a.n_kv_heads, a.causal, a.window = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    a.softcap = (<double*> numbers)[5]
    a.t_q, a.t_k, a.d_head = q.ne[1] // a.batch, k.ne[1] // a.batch, q.ne[0] // a.n_heads
    a.q, a.q_stride, a.k, a.k_stride, a.v, a.v_stride = data(q), stride(q), data(k), stride(k), data(v), stride(v)


cdef void attention_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef Attention a
    fill_attention(&a, <const int64_t*> params, dst.src[0], dst.src[1], dst.src[2])
    a.largest, a.scratch = data(dst.src[3]), data(dst.src[4])
    a.out, a.out_stride = data(dst), stride(dst)
    attention_forward(&a, ith, nth)


cdef void attention_backward_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst: (rows, width of q + k + v), the three gradients side by side."""
    cdef Attention a
    cdef const ggml_tensor* d_out = dst.src[5]
    fill_attention(&a, <const int64_t*> params, dst.src[0], dst.src[1], dst.src[2])
    a.largest, a.scratch = data(dst.src[3]), data(dst.src[4])
    a.out, a.out_stride, a.d_out, a.d_out_stride = NULL, 0, data(d_out), stride(d_out)
    a.d_q, a.d_q_stride = data(dst), stride(dst)
    a.d_k, a.d_k_stride = a.d_q + dst.src[0].ne[0], stride(dst)
    a.d_v, a.d_v_stride = a.d_k + dst.src[1].ne[0], stride(dst)
    attention_backward_(&a, ith, nth)


# -- softmax cross-entropy --------------------------------------------------------------------------------------------------
# statistics: (4, rows) floats: the losses as doubles, then largest and share

cdef inline void fill_loss(CrossEntropy* a, const ggml_tensor* logits, const ggml_tensor* labels,
                           const ggml_tensor* statistics, bint dense) noexcept nogil:
    a.rows, a.columns = logits.ne[1], logits.ne[0]
    a.logits, a.logits_stride = data(logits), stride(logits)
    a.labels = NULL if dense else <const long long*> labels.data
    a.targets = data(labels) if dense else NULL
    a.targets_stride = stride(labels) if dense else 0
    a.losses = <double*> statistics.data
    a.largest = data(statistics) + 2 * a.rows
    a.share = a.largest + a.rows
    a.d_logits, a.d_logits_stride, a.scale = NULL, 0, 0


cdef void cross_entropy_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef CrossEntropy a  # dst is a view of the statistics, src[0]
    fill_loss(&a, dst.src[1], dst.src[2], dst, (<int64_t*> params)[0])
    cross_entropy_forward(&a, ith, nth)


cdef void counted_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst: (4,) the beginning of the totals of a loss, from labels of which src[0] has a row each: a double 0, to which
    losses are added, the number of rows that count, and 1 / that number."""
    cdef const ggml_tensor* labels = dst.src[0]
    cdef bint dense = (<int64_t*> params)[0]
    cdef Py_ssize_t i, j, counted = 0
    cdef const float* row
    if ith == 0:
        for i in range(labels.ne[1]):
            if not dense:
                counted += (<const long long*> labels.data)[i] >= 0
                continue
            row = data(labels) + i * stride(labels)
            for j in range(labels.ne[0]):
                if row[j] != 0:
                    counted += 1
                    break
        (<double*> dst.data)[0] = 0
        data(dst)[2] = <float> counted
        data(dst)[3] = <float> (1.0 / (counted if counted else 1))


cdef void add_losses_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst is a view of the totals, src[0]; the losses in the statistics, src[1], are added to them."""
    cdef const double* losses = <const double*> dst.src[1].data
    cdef Py_ssize_t i
    if ith == 0:
        for i in range(dst.src[1].ne[0]):
            (<double*> dst.data)[0] += losses[i]


cdef void mean_loss_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst: (2,) the mean loss, of the totals src[0], and 1 / number of rows that count."""
    cdef const float* counted = data(dst.src[0]) + 2
    if ith == 0:
        data(dst)[0] = <float> ((<const double*> dst.src[0].data)[0] / (counted[0] if counted[0] else 1))
        data(dst)[1] = counted[1]


cdef void cross_entropy_backward_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef CrossEntropy a  # dst is a view of the logits, src[0]: their gradient takes their place
    fill_loss(&a, dst, dst.src[1], dst.src[2], (<int64_t*> params)[0])
    a.scale = data(dst.src[3])[3]  # of the totals
    a.d_logits, a.d_logits_stride = data(dst), stride(dst)
    cross_entropy_backward_(&a, ith, nth)


# -- the optimizer --------------------------------------------------------------------------------------------------------

cdef void adamw_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef AdamW a
    cdef const float* hp = data(dst.src[4])
    a.size = size_of(dst.src[0])
    a.weight, a.gradient, a.m, a.v = data(dst.src[0]), data(dst.src[1]), data(dst.src[2]), data(dst.src[3])
    a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.s5, a.s6 = hp[0], hp[1], hp[2], hp[3], hp[4], hp[5], hp[6]
    a.factor = data(dst.src[5])[1] if dst.src[5] != NULL else 1  # of norm_and_factor
    adamw_update(&a, ith, nth)


cdef void squares_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst: doubles, one a thread: the sum of squares of its slice of src[0]."""
    cdef Py_ssize_t size = size_of(dst.src[0])
    cdef Py_ssize_t start = slice_start(size, 16, ith, nth)
    (<double*> dst.data)[ith] = toy_sum_of_squares(data(dst.src[0]) + start, slice_start(size, 16, ith + 1, nth) - start)


cdef void norm_and_factor_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    """dst: (2,) the square root of the sum of all doubles in src[0], and what to multiply with so that it is at most the clip."""
    cdef const double* parts = <const double*> dst.src[0].data
    cdef double clip = (<double*> params)[0], total = 0, norm
    cdef Py_ssize_t i
    if ith == 0:
        for i in range(size_of(dst.src[0]) // 2):
            total += parts[i]
        norm = total ** 0.5
        data(dst)[0] = <float> norm
        data(dst)[1] = <float> (clip / norm) if norm > clip else 1


cdef void scaled_node(ggml_tensor* dst, int ith, int nth, void* params) noexcept nogil:
    cdef const float* x = data(dst.src[0])
    cdef float factor = data(dst.src[1])[1]
    cdef Py_ssize_t size = size_of(dst), i
    for i in range(slice_start(size, 16, ith, nth), slice_start(size, 16, ith + 1, nth)):
        data(dst)[i] = factor * x[i]


WIDEN = kernel_capsule(widen_node)
EMBEDDING = kernel_capsule(embedding_node)
EMBEDDING_BACKWARD = kernel_capsule(embedding_backward_node)
LINEAR = kernel_capsule(linear_node)
LINEAR_BACKWARD_INPUT = kernel_capsule(linear_backward_input_node)
LINEAR_BACKWARD_WEIGHT = kernel_capsule(linear_backward_weight_node)
QUANTIZED_EMBEDDING = kernel_capsule(quantized_embedding_node)
QUANTIZED_LINEAR = kernel_capsule(quantized_linear_node)
QUANTIZED_LINEAR_BACKWARD_INPUT = kernel_capsule(quantized_linear_backward_input_node)
RMS_NORM = kernel_capsule(rms_norm_node)
LAYER_NORM = kernel_capsule(layer_norm_node)
RMS_NORM_BACKWARD = kernel_capsule(rms_norm_backward_node)
LAYER_NORM_BACKWARD = kernel_capsule(layer_norm_backward_node)
ADD_PARTIALS = kernel_capsule(add_partials_node)
ELEMENTWISE = kernel_capsule(elementwise_node)
ROPE = kernel_capsule(rope_node)
ATTENTION = kernel_capsule(attention_node)
ATTENTION_BACKWARD = kernel_capsule(attention_backward_node)
CROSS_ENTROPY = kernel_capsule(cross_entropy_node)
COUNTED = kernel_capsule(counted_node)
ADD_LOSSES = kernel_capsule(add_losses_node)
MEAN_LOSS = kernel_capsule(mean_loss_node)
CROSS_ENTROPY_BACKWARD = kernel_capsule(cross_entropy_backward_node)
ADAMW = kernel_capsule(adamw_node)
SQUARES = kernel_capsule(squares_node)
NORM_AND_FACTOR = kernel_capsule(norm_and_factor_node)
SCALED = kernel_capsule(scaled_node)


cdef void run_on_pool(slice_t slice, void* args, int nth) noexcept nogil:
    run(<Kernel> slice, args, nth)


# the kernels' own threads, for `ggml_bridge.Backend(runner=...)`: they sleep when there is nothing to do
POOL = runner_capsule(run_on_pool)


# by id of the capsule: what each kernel is called, "linear_backward_weight"
NAMES = {id(value): name.lower() for name, value in dict(globals()).items() if type(value).__name__ == "PyCapsule"}


def attention_scratch_floats(t_q, t_k, d_head, softcap=0.0):
    """Floats of scratch that one thread of the attention kernels needs for these sizes; softcap: 0 = none."""
    cdef Attention a
    a.t_q, a.t_k, a.d_head, a.softcap = t_q, t_k, d_head, softcap
    return attention_scratch(&a)


def elementwise(name, factor=0.0):
    """The params of an ELEMENTWISE node: "gelu", "gelu_backward", ... as `toy._kernels.elementwise` calls them. factor: the
    number that some of them take."""
    cdef ElementwiseNode node
    node.kernel = elementwise_kernel(name)
    node.is_backward = name.endswith("_backward")
    node.factor = factor
    return (<char*> &node)[:sizeof(ElementwiseNode)]


def quantized_floats(n_in, n_out):
    """Floats of scratch that one thread of the products with a quantised weight (n_out, n_in) needs."""
    return quantized_scratch_floats(n_in, n_out)


def quantized_type(name):
    """The params of the nodes with a quantised weight of a type ("q4_1"), None for a type that they do not read."""
    number = QUANTIZED_TYPES.get(name.upper())
    return None if number is None else struct.pack("q", number)


def compute(graph):
    """graph.compute() with BLAS held to one thread a caller."""
    blas.enter()
    try:
        graph.compute()
    finally:
        blas.leave()
