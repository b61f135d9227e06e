// The ggml functions that the bridge calls, bound at run time.
//
// The extension is compiled against ggml's headers but not linked with its libraries: loading.py opens the libraries
// and hands over the addresses. So the module imports without ggml (and can say why ggml is missing), works for wheels,
// source builds and editable installs alike, and never meets another copy of ggml in the same process.

#ifndef GGML_BRIDGE_FUNCTIONS_H
#define GGML_BRIDGE_FUNCTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"

// Thread pools belong to the CPU backend, which may be a module that only the registry knows: their addresses come from
// ggml_backend_reg_get_proc_address (see bind_cpu_function).
typedef struct ggml_threadpool *(*bridge_threadpool_new_t)(struct ggml_threadpool_params *);
typedef void (*bridge_threadpool_free_t)(struct ggml_threadpool *);
typedef ggml_backend_buffer_type_t *(*bridge_extra_bufts_t)(ggml_backend_dev_t);
typedef void (*bridge_set_threadpool_t)(ggml_backend_t, struct ggml_threadpool *);

#define GGML_BRIDGE_FUNCTIONS(X) \
    X(ggml_version) X(ggml_log_set) X(ggml_status_to_string) \
    X(ggml_type_size) X(ggml_blck_size) X(ggml_type_name) X(ggml_is_quantized) \
    X(ggml_op_name) X(ggml_op_desc) X(ggml_nelements) X(ggml_nbytes) X(ggml_tensor_overhead) \
    X(ggml_fp32_to_bf16_row) X(ggml_validate_row_data) X(ggml_quantize_chunk) \
    X(ggml_is_contiguous) X(ggml_is_contiguous_1) X(ggml_is_transposed) \
    X(ggml_init) X(ggml_free) X(ggml_new_tensor) X(ggml_set_name) X(ggml_set_input) X(ggml_set_output) X(ggml_set_param) \
    X(ggml_new_graph_custom) X(ggml_graph_overhead_custom) X(ggml_build_forward_expand) \
    X(ggml_add) X(ggml_add_inplace) X(ggml_sub) X(ggml_mul) X(ggml_div) X(ggml_scale_bias) X(ggml_sqr) X(ggml_sqrt) \
    X(ggml_log) X(ggml_sin) X(ggml_cos) X(ggml_unary) X(ggml_sum) X(ggml_sum_rows) X(ggml_mean) X(ggml_cumsum) \
    X(ggml_argmax) X(ggml_repeat_4d) X(ggml_concat) X(ggml_silu_back) X(ggml_glu_split) X(ggml_norm) X(ggml_rms_norm) \
    X(ggml_mul_mat) X(ggml_cpy) X(ggml_cast) X(ggml_cont_4d) X(ggml_reshape_4d) X(ggml_view_4d) X(ggml_permute) \
    X(ggml_get_rows) X(ggml_set_rows) X(ggml_soft_max_ext) X(ggml_rope_ext) X(ggml_rope_ext_back) X(ggml_fill_inplace) \
    X(ggml_custom_4d) X(ggml_custom_inplace) X(ggml_opt_step_adamw) \
    X(ggml_backend_load_all_from_path) X(ggml_backend_reg_count) X(ggml_backend_reg_get) X(ggml_backend_reg_name) \
    X(ggml_backend_reg_get_proc_address) X(ggml_backend_dev_count) X(ggml_backend_dev_get) \
    X(ggml_backend_dev_backend_reg) X(ggml_backend_dev_get_props) X(ggml_backend_dev_init) \
    X(ggml_backend_dev_memory) X(ggml_backend_dev_buffer_type) X(ggml_backend_dev_supports_op) \
    X(ggml_backend_dev_buffer_from_host_ptr) \
    X(ggml_backend_free) X(ggml_backend_graph_compute) \
    X(ggml_backend_buft_get_alignment) X(ggml_backend_buft_get_max_size) X(ggml_backend_buft_get_alloc_size) \
    X(ggml_backend_buft_alloc_buffer) \
    X(ggml_backend_buffer_free) X(ggml_backend_buffer_get_base) \
    X(ggml_backend_buffer_clear) X(ggml_backend_buffer_set_usage) \
    X(ggml_backend_tensor_alloc) X(ggml_backend_view_init) X(ggml_backend_tensor_set) X(ggml_backend_tensor_get) \
    X(ggml_backend_tensor_memset) \
    X(ggml_threadpool_params_init)

#define GGML_BRIDGE_POINTER(name) static __typeof__(name) *bridge_##name;
#define GGML_BRIDGE_NAME(name) #name,
#define GGML_BRIDGE_SLOT(name) (void **)&bridge_##name,

GGML_BRIDGE_FUNCTIONS(GGML_BRIDGE_POINTER)

static const char *const bridge_function_names[] = {GGML_BRIDGE_FUNCTIONS(GGML_BRIDGE_NAME) NULL};
static void **const bridge_function_slots[] = {GGML_BRIDGE_FUNCTIONS(GGML_BRIDGE_SLOT) NULL};

static bridge_threadpool_new_t bridge_threadpool_new;
static bridge_threadpool_free_t bridge_threadpool_free;
static bridge_set_threadpool_t bridge_set_threadpool;
static bridge_extra_bufts_t bridge_extra_bufts;
static ggml_backend_set_n_threads_t bridge_set_n_threads;

// Bytes of one tensor inside a ggml context: what ggml_tensor_overhead() must return when library and headers agree.
// The object header in front of a tensor is 32 bytes on 64-bit machines.
static const size_t bridge_tensor_bytes = sizeof(struct ggml_tensor);

#ifndef GGML_BRIDGE_HEADERS_VERSION
#define GGML_BRIDGE_HEADERS_VERSION "unknown"
#endif
static const char *const bridge_headers_version = GGML_BRIDGE_HEADERS_VERSION;

// ggml's last warning or error on this thread, to be quoted in an exception instead of printed.
#if defined(_MSC_VER)
static __declspec(thread) char bridge_message[512];
#else
static __thread char bridge_message[512];
#endif

static void bridge_log(enum ggml_log_level level, const char *text, void *user_data) {
    (void)user_data;
    if (level != GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_ERROR) {
        return;
    }
    size_t length = strlen(text);
    while (length > 0 && (text[length - 1] == '\n' || text[length - 1] == ' ')) {
        length--;
    }
    if (length > sizeof(bridge_message) - 1) {
        length = sizeof(bridge_message) - 1;
    }
    memcpy(bridge_message, text, length);
    bridge_message[length] = '\0';
}

// What this x86 processor and its operating system can run, read with cpuid and xgetbv only.
// Bits: 1 = AVX2, 2 = FMA, 4 = F16C. Returns -1 where the question does not arise (not x86).
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)
#if defined(_MSC_VER)
#include <intrin.h>
static void bridge_cpuid(int leaf, int subleaf, unsigned registers[4]) {
    __cpuidex((int *)registers, leaf, subleaf);
}
static unsigned long long bridge_xgetbv(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void bridge_cpuid(int leaf, int subleaf, unsigned registers[4]) {
    registers[0] = registers[1] = registers[2] = registers[3] = 0;
    __get_cpuid_count((unsigned)leaf, (unsigned)subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
}
static unsigned long long bridge_xgetbv(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((unsigned long long)high << 32) | low;
}
#endif
static int bridge_x86_features(void) {
    unsigned one[4], seven[4];
    bridge_cpuid(1, 0, one);
    bridge_cpuid(7, 0, seven);
    const int osxsave = (one[2] >> 27) & 1;
    const int os_saves_ymm = osxsave && (bridge_xgetbv() & 6) == 6;
    if (!os_saves_ymm) {
        return 0;
    }
    return (((seven[1] >> 5) & 1) ? 1 : 0) | (((one[2] >> 12) & 1) ? 2 : 0) | (((one[2] >> 29) & 1) ? 4 : 0);
}
#else
static int bridge_x86_features(void) { return -1; }
#endif

#endif
