// A played NVIDIA card for ggml: the backend "CUDA" with devices CUDA0, CUDA1, ... that compute on the CPU.
//
// ggml loads it as the module libggml-cuda.so of a directory. The environment says what it plays: PLAYED_CARDS (how many; none is
// a machine without a driver), PLAYED_FREE and PLAYED_TOTAL (bytes of memory of each), PLAYED_ARCHITECTURES (what the build was
// compiled for). The same file with -DDRIVER is the driver's library, libcuda.so.1, whose cards are of architecture
// PLAYED_CAPABILITY (for example 61). The structures are those of ggml 0.20's ggml-backend-impl.h.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t number(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text != NULL ? strtoull(text, NULL, 10) : otherwise;
}

#ifdef DRIVER

int cuInit(unsigned flags) { return (int)flags; }

int cuDeviceGet(int *device, int index) {
    *device = index;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int capability = (int)number("PLAYED_CAPABILITY", 90);
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return device < 0;
}

#else

#include "ggml-backend.h"
#include "ggml-cpu.h"

enum { NAME, DESCRIPTION, MEMORY, KIND, PROPERTIES, OPEN, FUNCTIONS = 15 };
enum { INTERFACE_VERSION = 2, MOST = 4 };

struct device {
    void *functions[FUNCTIONS];
    ggml_backend_reg_t backend;
    void *context;
};

struct backend {
    int version;
    void *functions[4];
    void *context;
};

void ggml_log_internal(enum ggml_log_level level, const char *format, ...);

static struct device cards[MOST];
static struct backend played;

static const char *card_name(struct device *card) {
    static const char *const names[MOST] = {"CUDA0", "CUDA1", "CUDA2", "CUDA3"};
    return names[card - cards];
}

static const char *card_description(struct device *card) {
    (void)card;
    return "Played card";
}

static void card_memory(struct device *card, size_t *free, size_t *total) {
    (void)card;
    *free = number("PLAYED_FREE", (size_t)8 << 30);
    *total = number("PLAYED_TOTAL", (size_t)8 << 30);
}

static enum ggml_backend_dev_type card_kind(struct device *card) {
    (void)card;
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void card_properties(struct device *card, struct ggml_backend_dev_props *properties) {
    memset(properties, 0, sizeof(*properties));
    properties->name = card_name(card);
    properties->description = card_description(card);
    properties->type = card_kind(card);
    card_memory(card, &properties->memory_free, &properties->memory_total);
}

// one thread: those of ggml spin while they wait for each other
static ggml_backend_t card_open(struct device *card, const char *parameters) {
    const ggml_backend_t opened = ggml_backend_cpu_init();
    (void)card, (void)parameters;
    ggml_backend_cpu_set_n_threads(opened, 1);
    return opened;
}

static const char *backend_name(struct backend *backend) {
    (void)backend;
    return "CUDA";
}

static size_t backend_count(struct backend *backend) {
    (void)backend;
    return number("PLAYED_CARDS", 1);
}

static struct device *backend_card(struct backend *backend, size_t index) {
    (void)backend;
    return &cards[index];
}

static struct ggml_backend_feature *backend_features(struct backend *backend) {
    static struct ggml_backend_feature features[2];
    (void)backend;
    features[0].name = "ARCHS";
    features[0].value = getenv("PLAYED_ARCHITECTURES") != NULL ? getenv("PLAYED_ARCHITECTURES") : "900";
    return features;
}

static void *backend_function(struct backend *backend, const char *name) {
    (void)backend;
    return strcmp(name, "ggml_backend_get_features") == 0 ? (void *)backend_features : NULL;
}

struct backend *ggml_backend_init(void) {
    const ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    for (int i = 0; i < MOST; i++) {
        memcpy(&cards[i], cpu, sizeof(cards[i]));  // its kernels, under another name
        cards[i].functions[NAME] = (void *)card_name;
        cards[i].functions[DESCRIPTION] = (void *)card_description;
        cards[i].functions[MEMORY] = (void *)card_memory;
        cards[i].functions[KIND] = (void *)card_kind;
        cards[i].functions[PROPERTIES] = (void *)card_properties;
        cards[i].functions[OPEN] = (void *)card_open;
        cards[i].backend = (ggml_backend_reg_t)&played;
    }
    if (number("PLAYED_CARDS", 1) == 0) {
        ggml_log_internal(GGML_LOG_LEVEL_ERROR, "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected\n");
    }
    played.version = INTERFACE_VERSION;
    played.functions[0] = (void *)backend_name;
    played.functions[1] = (void *)backend_count;
    played.functions[2] = (void *)backend_card;
    played.functions[3] = (void *)backend_function;
    return &played;
}

#endif
