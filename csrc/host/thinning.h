#pragma once

#include "host/bitmap.h"

namespace taskgroup {

// Thins lines and regions to lines of one pixel that stay connected (Guo and Hall, Communications
// of the ACM 32, 1989; with the second condition as in scikit-image's `thin`, which is MATLAB's
// bwmorph(..., 'thin', Inf)).
void thin(Bitmap& image);

}  // namespace taskgroup
