// Three types of VK_EXT_layer_settings that ggml-vulkan.cpp names and that Vulkan headers older than 1.3.272 (Debian 12) lack.
// Given to the compiler with -include; newer headers have their own.
#ifdef __cplusplus
#include <cstdint>
#include <vector>
#include <vulkan/vulkan.h>
#if VK_HEADER_VERSION < 272
namespace vk {
enum class LayerSettingTypeEXT { eBool32 = 0 };
struct LayerSettingEXT {
    const char *pLayerName;
    const char *pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void *pValues;
};
struct LayerSettingsCreateInfoEXT {
    int32_t sType = 1000496000;  // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    const void *pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT *pSettings;
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> &settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}
};
}  // namespace vk
#endif
#endif
