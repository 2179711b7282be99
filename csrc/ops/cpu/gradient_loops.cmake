# The loops over gradients are compiled once for each instruction set, and one of them is chosen at
# run time. Tests compare them with a float64 reference up to a tolerance, so products and sums may be
# fused.
set(LOOPS ${CMAKE_CURRENT_LIST_DIR}/gradient_loops)
if(NOT LOOPS_OPTIMIZE)
  set(LOOPS_OPTIMIZE -O3)  # whatever the rest is built with
endif()
# GCC 12 does not see that the sums of a tile are set before they are read, and warns of its own header
# of AVX-512 functions.
set(LOOPS_OPTIONS ${LOOPS_OPTIMIZE} -ffp-contract=fast -Wno-uninitialized -Wno-maybe-uninitialized)
set_source_files_properties(${LOOPS}_portable.cpp PROPERTIES COMPILE_OPTIONS "${LOOPS_OPTIONS}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set_source_files_properties(
    ${LOOPS}_avx2.cpp PROPERTIES COMPILE_OPTIONS "${LOOPS_OPTIONS};-mavx2;-mfma;-mf16c")
  set_source_files_properties(
    ${LOOPS}_avx512.cpp PROPERTIES COMPILE_OPTIONS "${LOOPS_OPTIONS};-mavx512f;-mfma")
  set(AVX512BF16 -mavx512f -mavx512bf16 -mfma)
  set_source_files_properties(
    ${LOOPS}_avx512bf16.cpp PROPERTIES COMPILE_OPTIONS "${LOOPS_OPTIONS};${AVX512BF16}")
  set_source_files_properties(
    ${LOOPS}_amx.cpp
    PROPERTIES COMPILE_OPTIONS "${LOOPS_OPTIONS};${AVX512BF16};-mamx-tile;-mamx-bf16")
endif()
