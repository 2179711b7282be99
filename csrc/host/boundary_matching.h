#pragma once

#include <cstdint>

namespace taskgroup {

// The number of pixels of one map that can be matched one to one to pixels of the other at a
// Euclidean distance of at most `distance` pixels: the size of a maximum matching.
int64_t match_boundaries(const uint8_t* one,    // [H, W], not 0 on the boundary
                         const uint8_t* other,  // [H, W]
                         int64_t H, int64_t W,
                         double distance);  // >= 0, may be infinite

// For every threshold k < n: thins the pixels that reach more than k thresholds, drops the unknown
// ones, and matches the rest with the label.
void count_boundaries(
    const uint8_t* reached,  // [H, W] the number of thresholds that a pixel reaches
    const uint8_t* label,    // [H, W] not 0 on the boundary, and only where known
    const uint8_t* known,    // [H, W]
    int64_t H, int64_t W,
    double distance,   // >= 0, may be infinite
    int64_t n,         // <= 255
    int64_t* counts);  // [3, n] the pixels matched, predicted and labelled

}  // namespace taskgroup
