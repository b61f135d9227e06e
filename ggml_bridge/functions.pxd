"""Declarations of functions.h: ggml's types, and its functions under the names of the pointers that loading.py fills."""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libcpp cimport bool as cbool

cdef extern from "functions.h" nogil:
    enum:
        GGML_MAX_SRC
        GGML_MAX_N_THREADS
        GGML_N_TASKS_MAX
        GGML_TENSOR_FLAG_OUTPUT
        GGML_ROPE_TYPE_NEOX
        GGML_STATUS_SUCCESS

    enum ggml_type:
        GGML_TYPE_F32
        GGML_TYPE_F16
        GGML_TYPE_BF16
        GGML_TYPE_I32
        GGML_TYPE_COUNT

    enum ggml_op:
        GGML_OP_NONE
        GGML_OP_ADD
        GGML_OP_SUB
        GGML_OP_MUL
        GGML_OP_DIV
        GGML_OP_SQR
        GGML_OP_SQRT
        GGML_OP_LOG
        GGML_OP_SCALE
        GGML_OP_RMS_NORM
        GGML_OP_SOFT_MAX
        GGML_OP_ROPE
        GGML_OP_ROPE_BACK
        GGML_OP_UNARY
        GGML_OP_FILL
        GGML_OP_CUSTOM
        GGML_OP_OPT_STEP_ADAMW
        GGML_OP_RESHAPE
        GGML_OP_VIEW
        GGML_OP_PERMUTE
        GGML_OP_TRANSPOSE

    enum ggml_unary_op:
        GGML_UNARY_OP_ABS
        GGML_UNARY_OP_SGN
        GGML_UNARY_OP_NEG
        GGML_UNARY_OP_STEP
        GGML_UNARY_OP_TANH
        GGML_UNARY_OP_RELU
        GGML_UNARY_OP_SIGMOID
        GGML_UNARY_OP_SILU
        GGML_UNARY_OP_EXP
        GGML_UNARY_OP_EXPM1
        GGML_UNARY_OP_SOFTPLUS
        GGML_UNARY_OP_GELU
        GGML_UNARY_OP_GELU_ERF

    enum ggml_glu_op:
        GGML_GLU_OP_GEGLU
        GGML_GLU_OP_SWIGLU

    enum ggml_status:
        pass

    enum ggml_log_level:
        pass

    ctypedef struct ggml_bf16_t:
        pass

    struct ggml_context:
        pass

    struct ggml_cgraph:
        pass

    struct ggml_threadpool:
        pass

    struct ggml_backend:
        pass

    struct ggml_backend_buffer:
        pass

    struct ggml_backend_buffer_type:
        pass

    struct ggml_backend_device:
        pass

    struct ggml_backend_reg:
        pass

    struct ggml_backend_feature:
        const char *name
        const char *value

    ctypedef ggml_backend_feature *(*ggml_backend_get_features_t)(ggml_backend_reg *reg)

    struct ggml_tensor:
        ggml_type type
        ggml_backend_buffer *buffer
        int64_t ne[4]
        size_t nb[4]
        ggml_op op
        int32_t flags
        ggml_tensor *src[10]
        ggml_tensor *view_src
        size_t view_offs
        void *data
        char name[64]

    struct ggml_init_params:
        size_t mem_size
        void *mem_buffer
        cbool no_alloc

    enum ggml_sched_priority:
        pass

    struct ggml_threadpool_params:
        int n_threads
        unsigned poll
        cbool paused

    struct ggml_backend_dev_caps:
        # `async` is a Python keyword, hence the C name in quotes
        cbool asynchronous "async"
        cbool host_buffer
        cbool buffer_from_host_ptr
        cbool events

    struct ggml_backend_dev_props:
        const char *name
        const char *description
        size_t memory_free
        size_t memory_total
        int type
        const char *device_id
        ggml_backend_dev_caps caps

    ctypedef void (*ggml_log_callback)(ggml_log_level level, const char *text, void *user_data) noexcept nogil
    ctypedef void (*ggml_custom_op_t)(ggml_tensor *dst, int ith, int nth, void *userdata) noexcept nogil

    # --- the bridge's own part of functions.h
    const char *const *bridge_function_names
    void ***bridge_function_slots
    ggml_threadpool *(*bridge_threadpool_new)(ggml_threadpool_params *)
    void (*bridge_threadpool_free)(ggml_threadpool *)
    ggml_backend_buffer_type **(*bridge_extra_bufts)(ggml_backend_device *)
    void (*bridge_set_threadpool)(ggml_backend *, ggml_threadpool *)
    void (*bridge_set_n_threads)(ggml_backend *, int)
    const size_t bridge_tensor_bytes
    const char *bridge_headers_version
    char *bridge_message
    void bridge_log(ggml_log_level level, const char *text, void *user_data)
    int bridge_x86_features()

    # --- ggml
    const char *ggml_version "bridge_ggml_version"()
    void ggml_log_set "bridge_ggml_log_set"(ggml_log_callback callback, void *user_data)
    const char *ggml_status_to_string "bridge_ggml_status_to_string"(int status)

    size_t ggml_type_size "bridge_ggml_type_size"(ggml_type type)
    int64_t ggml_blck_size "bridge_ggml_blck_size"(ggml_type type)
    const char *ggml_type_name "bridge_ggml_type_name"(ggml_type type)
    cbool ggml_is_quantized "bridge_ggml_is_quantized"(ggml_type type)
    const char *ggml_op_name "bridge_ggml_op_name"(ggml_op op)
    const char *ggml_op_desc "bridge_ggml_op_desc"(const ggml_tensor *t)
    int64_t ggml_nelements "bridge_ggml_nelements"(const ggml_tensor *t)
    size_t ggml_nbytes "bridge_ggml_nbytes"(const ggml_tensor *t)
    size_t ggml_tensor_overhead "bridge_ggml_tensor_overhead"()
    void ggml_fp32_to_bf16_row "bridge_ggml_fp32_to_bf16_row"(const float *x, ggml_bf16_t *y, int64_t n)
    size_t ggml_quantize_chunk "bridge_ggml_quantize_chunk"(
        ggml_type type, const float *src, void *dst, int64_t start, int64_t nrows, int64_t n_per_row, const float *imatrix
    )
    cbool ggml_validate_row_data "bridge_ggml_validate_row_data"(ggml_type type, const void *data, size_t nbytes)
    cbool ggml_is_contiguous "bridge_ggml_is_contiguous"(const ggml_tensor *t)
    cbool ggml_is_contiguous_1 "bridge_ggml_is_contiguous_1"(const ggml_tensor *t)
    cbool ggml_is_transposed "bridge_ggml_is_transposed"(const ggml_tensor *t)

    ggml_context *ggml_init "bridge_ggml_init"(ggml_init_params params)
    void ggml_free "bridge_ggml_free"(ggml_context *ctx)
    ggml_tensor *ggml_new_tensor "bridge_ggml_new_tensor"(ggml_context *ctx, ggml_type type, int n_dims, const int64_t *ne)
    ggml_tensor *ggml_set_name "bridge_ggml_set_name"(ggml_tensor *t, const char *name)
    void ggml_set_input "bridge_ggml_set_input"(ggml_tensor *t)
    void ggml_set_output "bridge_ggml_set_output"(ggml_tensor *t)
    void ggml_set_param "bridge_ggml_set_param"(ggml_tensor *t)
    ggml_cgraph *ggml_new_graph_custom "bridge_ggml_new_graph_custom"(ggml_context *ctx, size_t size, cbool grads)
    size_t ggml_graph_overhead_custom "bridge_ggml_graph_overhead_custom"(size_t size, cbool grads)
    void ggml_build_forward_expand "bridge_ggml_build_forward_expand"(ggml_cgraph *graph, ggml_tensor *t)

    ggml_tensor *ggml_add "bridge_ggml_add"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_add_inplace "bridge_ggml_add_inplace"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_sub "bridge_ggml_sub"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_mul "bridge_ggml_mul"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_div "bridge_ggml_div"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_scale_bias "bridge_ggml_scale_bias"(ggml_context *, ggml_tensor *a, float s, float b)
    ggml_tensor *ggml_sqr "bridge_ggml_sqr"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_sqrt "bridge_ggml_sqrt"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_log "bridge_ggml_log"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_sin "bridge_ggml_sin"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_cos "bridge_ggml_cos"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_unary "bridge_ggml_unary"(ggml_context *, ggml_tensor *a, ggml_unary_op op)
    ggml_tensor *ggml_sum "bridge_ggml_sum"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_sum_rows "bridge_ggml_sum_rows"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_mean "bridge_ggml_mean"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_cumsum "bridge_ggml_cumsum"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_argmax "bridge_ggml_argmax"(ggml_context *, ggml_tensor *a)
    ggml_tensor *ggml_repeat_4d "bridge_ggml_repeat_4d"(ggml_context *, ggml_tensor *a, int64_t, int64_t, int64_t, int64_t)
    ggml_tensor *ggml_concat "bridge_ggml_concat"(ggml_context *, ggml_tensor *a, ggml_tensor *b, int dim)
    ggml_tensor *ggml_silu_back "bridge_ggml_silu_back"(ggml_context *, ggml_tensor *dy, ggml_tensor *x)
    ggml_tensor *ggml_glu_split "bridge_ggml_glu_split"(ggml_context *, ggml_tensor *a, ggml_tensor *b, ggml_glu_op op)
    ggml_tensor *ggml_norm "bridge_ggml_norm"(ggml_context *, ggml_tensor *a, float eps)
    ggml_tensor *ggml_rms_norm "bridge_ggml_rms_norm"(ggml_context *, ggml_tensor *a, float eps)
    ggml_tensor *ggml_mul_mat "bridge_ggml_mul_mat"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_cpy "bridge_ggml_cpy"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_cast "bridge_ggml_cast"(ggml_context *, ggml_tensor *a, ggml_type type)
    ggml_tensor *ggml_cont_4d "bridge_ggml_cont_4d"(ggml_context *, ggml_tensor *a, int64_t, int64_t, int64_t, int64_t)
    ggml_tensor *ggml_reshape_4d "bridge_ggml_reshape_4d"(ggml_context *, ggml_tensor *a, int64_t, int64_t, int64_t, int64_t)
    ggml_tensor *ggml_view_4d "bridge_ggml_view_4d"(ggml_context *, ggml_tensor *a, int64_t, int64_t, int64_t, int64_t,
                                                    size_t nb1, size_t nb2, size_t nb3, size_t offset)
    ggml_tensor *ggml_permute "bridge_ggml_permute"(ggml_context *, ggml_tensor *a, int, int, int, int)
    ggml_tensor *ggml_get_rows "bridge_ggml_get_rows"(ggml_context *, ggml_tensor *a, ggml_tensor *b)
    ggml_tensor *ggml_set_rows "bridge_ggml_set_rows"(ggml_context *, ggml_tensor *a, ggml_tensor *b, ggml_tensor *c)
    ggml_tensor *ggml_soft_max_ext "bridge_ggml_soft_max_ext"(ggml_context *, ggml_tensor *a, ggml_tensor *mask,
                                                              float scale, float max_bias)
    ggml_tensor *ggml_rope_ext "bridge_ggml_rope_ext"(
        ggml_context *, ggml_tensor *a, ggml_tensor *b, ggml_tensor *c, int n_dims, int mode, int n_ctx_orig,
        float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow)
    ggml_tensor *ggml_rope_ext_back "bridge_ggml_rope_ext_back"(
        ggml_context *, ggml_tensor *a, ggml_tensor *b, ggml_tensor *c, int n_dims, int mode, int n_ctx_orig,
        float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow)
    ggml_tensor *ggml_fill_inplace "bridge_ggml_fill_inplace"(ggml_context *, ggml_tensor *a, float c)
    ggml_tensor *ggml_custom_4d "bridge_ggml_custom_4d"(
        ggml_context *, ggml_type type, int64_t, int64_t, int64_t, int64_t, ggml_tensor **args, int n_args,
        ggml_custom_op_t fun, int n_tasks, void *userdata)
    ggml_tensor *ggml_custom_inplace "bridge_ggml_custom_inplace"(
        ggml_context *, ggml_tensor *a, ggml_tensor **args, int n_args, ggml_custom_op_t fun, int n_tasks, void *userdata)
    ggml_tensor *ggml_opt_step_adamw "bridge_ggml_opt_step_adamw"(
        ggml_context *, ggml_tensor *a, ggml_tensor *grad, ggml_tensor *m, ggml_tensor *v, ggml_tensor *hp)

    void ggml_backend_load_all_from_path "bridge_ggml_backend_load_all_from_path"(const char *directory)
    size_t ggml_backend_reg_count "bridge_ggml_backend_reg_count"()
    ggml_backend_reg *ggml_backend_reg_get "bridge_ggml_backend_reg_get"(size_t i)
    const char *ggml_backend_reg_name "bridge_ggml_backend_reg_name"(ggml_backend_reg *reg)
    void *ggml_backend_reg_get_proc_address "bridge_ggml_backend_reg_get_proc_address"(ggml_backend_reg *reg, const char *name)
    size_t ggml_backend_dev_count "bridge_ggml_backend_dev_count"()
    ggml_backend_device *ggml_backend_dev_get "bridge_ggml_backend_dev_get"(size_t i)
    ggml_backend_reg *ggml_backend_dev_backend_reg "bridge_ggml_backend_dev_backend_reg"(ggml_backend_device *device)
    void ggml_backend_dev_get_props "bridge_ggml_backend_dev_get_props"(ggml_backend_device *device, ggml_backend_dev_props *props)
    ggml_backend *ggml_backend_dev_init "bridge_ggml_backend_dev_init"(ggml_backend_device *device, const char *params)
    void ggml_backend_dev_memory "bridge_ggml_backend_dev_memory"(ggml_backend_device *device, size_t *free, size_t *total)
    ggml_backend_buffer_type *ggml_backend_dev_buffer_type "bridge_ggml_backend_dev_buffer_type"(ggml_backend_device *device)
    cbool ggml_backend_dev_supports_op "bridge_ggml_backend_dev_supports_op"(ggml_backend_device *device, const ggml_tensor *op)
    ggml_backend_buffer *ggml_backend_dev_buffer_from_host_ptr "bridge_ggml_backend_dev_buffer_from_host_ptr"(
        ggml_backend_device *device, void *ptr, size_t size, size_t max_tensor_size)
    void ggml_backend_free "bridge_ggml_backend_free"(ggml_backend *backend)
    int ggml_backend_graph_compute "bridge_ggml_backend_graph_compute"(ggml_backend *backend, ggml_cgraph *graph)
    size_t ggml_backend_buft_get_alignment "bridge_ggml_backend_buft_get_alignment"(ggml_backend_buffer_type *buft)
    size_t ggml_backend_buft_get_max_size "bridge_ggml_backend_buft_get_max_size"(ggml_backend_buffer_type *buft)
    size_t ggml_backend_buft_get_alloc_size "bridge_ggml_backend_buft_get_alloc_size"(ggml_backend_buffer_type *buft, const ggml_tensor *t)
    ggml_backend_buffer *ggml_backend_buft_alloc_buffer "bridge_ggml_backend_buft_alloc_buffer"(ggml_backend_buffer_type *buft, size_t size)
    void ggml_backend_buffer_free "bridge_ggml_backend_buffer_free"(ggml_backend_buffer *buffer)
    void *ggml_backend_buffer_get_base "bridge_ggml_backend_buffer_get_base"(ggml_backend_buffer *buffer)
    void ggml_backend_buffer_clear "bridge_ggml_backend_buffer_clear"(ggml_backend_buffer *buffer, uint8_t value)
    void ggml_backend_buffer_set_usage "bridge_ggml_backend_buffer_set_usage"(ggml_backend_buffer *buffer, int usage)
    int ggml_backend_tensor_alloc "bridge_ggml_backend_tensor_alloc"(ggml_backend_buffer *buffer, ggml_tensor *t, void *address)
    int ggml_backend_view_init "bridge_ggml_backend_view_init"(ggml_tensor *t)
    void ggml_backend_tensor_set "bridge_ggml_backend_tensor_set"(ggml_tensor *t, const void *data, size_t offset, size_t size)
    void ggml_backend_tensor_get "bridge_ggml_backend_tensor_get"(const ggml_tensor *t, void *data, size_t offset, size_t size)
    void ggml_backend_tensor_memset "bridge_ggml_backend_tensor_memset"(ggml_tensor *t, uint8_t value, size_t offset, size_t size)
    void ggml_threadpool_params_init "bridge_ggml_threadpool_params_init"(ggml_threadpool_params *params, int n_threads)
