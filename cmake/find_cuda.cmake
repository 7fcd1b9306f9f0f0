# Looks for what the CUDA backend is built with, in a toolkit or in the pip packages of
# requirements-cuda.txt, and sets
#
#   TINYVLLM_NVCC               its compiler
#   tinyvllm_cuda_root          the toolkit that it belongs to
#   TINYVLLM_CUBLASLT_INCLUDE   where cublasLt.h lies
#   tinyvllm_cublaslt           the library itself, which the engine opens when it starts, where it is
#                               the toolkit's
#   tinyvllm_cuda_missing       what of nvcc and the headers was not found, in words; empty: nothing
#
# `cmake -P cmake/find_cuda.cmake` ends with 0 if there is a toolkit with all of this, pip's packages
# aside.

cmake_minimum_required(VERSION 3.24)

# The pip packages put all of CUDA 13 into site-packages/nvidia/cu13.
set(tinyvllm_cuda_pip "")
if(NOT CMAKE_SCRIPT_MODE_FILE)
  file(GLOB tinyvllm_cuda_pip "${Python_SITEARCH}/nvidia/cu*" "${Python_SITELIB}/nvidia/cu*")
endif()
find_program(TINYVLLM_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
             PATHS ${tinyvllm_cuda_pip} /usr/local/cuda PATH_SUFFIXES bin)
set(tinyvllm_cuda_missing "")
if(TINYVLLM_NVCC)
  # Where nvcc itself says that it lies; the one on the PATH may be a wrapper.
  execute_process(COMMAND ${TINYVLLM_NVCC} --dryrun --run x.cu ERROR_VARIABLE dryrun OUTPUT_QUIET)
  if(dryrun MATCHES "#\\$ TOP=([^\r\n]*)")
    get_filename_component(tinyvllm_cuda_root "${CMAKE_MATCH_1}" REALPATH)
  endif()
  file(GLOB tinyvllm_cublaslt "${tinyvllm_cuda_root}/lib64/libcublasLt.so.*"
       "${tinyvllm_cuda_root}/targets/x86_64-linux/lib/libcublasLt.so.*")
  find_path(TINYVLLM_CUBLASLT_INCLUDE cublasLt.h
            HINTS ${tinyvllm_cuda_root}/include ${tinyvllm_cuda_pip} PATH_SUFFIXES include)
else()
  list(APPEND tinyvllm_cuda_missing "nvcc")
endif()
if(NOT TINYVLLM_CUBLASLT_INCLUDE)
  list(APPEND tinyvllm_cuda_missing "the headers of cuBLAS")
endif()
list(JOIN tinyvllm_cuda_missing " and " tinyvllm_cuda_missing)

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  if(tinyvllm_cuda_missing OR NOT tinyvllm_cublaslt)
    message("There is no CUDA toolkit with cuBLAS here.")
    cmake_language(EXIT 1)
  endif()
  message("There is a CUDA toolkit in ${tinyvllm_cuda_root}.")
endif()
