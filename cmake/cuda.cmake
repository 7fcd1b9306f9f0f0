# The CUDA backend: finds what it needs and sets
#
#   tinyvllm_cuda          OFF, ON or EMULATE: what is built
#   tinyvllm_cuda_summary  that in words
#
# TINYVLLM_CUDA says what is wanted:
#   AUTO     ON where nvcc and the headers of cuBLAS are found, in a toolkit or in the pip packages of
#            the build's Python (requirements-cuda.txt), else OFF
#   ON       the same, but an error if anything is missing
#   OFF      the CPU engine only
#   EMULATE  the CUDA code, compiled with the host's compiler and run by csrc/cuda/emulator: slow, for
#            tests and for machines without a GPU
set(TINYVLLM_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO, ON, OFF or EMULATE")
set_property(CACHE TINYVLLM_CUDA PROPERTY STRINGS AUTO ON OFF EMULATE)
set(TINYVLLM_CUDA_ARCHITECTURES "" CACHE STRING
    "Compute capabilities to build for, as CMAKE_CUDA_ARCHITECTURES; empty: those of the cards in this machine, without one 90. Releases: 80;89;90;100;120")

string(TOUPPER "${TINYVLLM_CUDA}" tinyvllm_cuda_wanted)
set(tinyvllm_cuda OFF)
set(tinyvllm_cuda_summary "no CUDA")

if(tinyvllm_cuda_wanted STREQUAL "EMULATE")
  set(tinyvllm_cuda EMULATE)
  set(tinyvllm_cuda_summary "CUDA emulated")
elseif(tinyvllm_cuda_wanted MATCHES "^(AUTO|ON)$")
  include(${CMAKE_CURRENT_LIST_DIR}/find_cuda.cmake)
  if(NOT tinyvllm_cuda_missing)
    set(tinyvllm_cuda ON)
  elseif(tinyvllm_cuda_wanted STREQUAL "ON")
    message(FATAL_ERROR "TINYVLLM_CUDA=ON: ${tinyvllm_cuda_missing} not found. Run `make cuda`, or `pip install "
                        "-r requirements-cuda.txt` into the Python that builds, or install the CUDA "
                        "toolkit and set CUDA_HOME.")
  else()
    set(tinyvllm_cuda_summary "no CUDA: ${tinyvllm_cuda_missing} not found")
  endif()
elseif(NOT tinyvllm_cuda_wanted STREQUAL "OFF")
  message(FATAL_ERROR "TINYVLLM_CUDA is ${TINYVLLM_CUDA}; it must be AUTO, ON, OFF or EMULATE.")
endif()

if(tinyvllm_cuda STREQUAL "ON")
  if(NOT TINYVLLM_CUDA_ARCHITECTURES)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE cards ERROR_QUIET RESULT_VARIABLE status)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" cards "${cards}")
    list(TRANSFORM cards REPLACE "\\." "")
    list(REMOVE_DUPLICATES cards)
    if(NOT cards)
      set(cards 90)
    endif()
    list(TRANSFORM cards APPEND "-real")
  else()
    set(cards ${TINYVLLM_CUDA_ARCHITECTURES})
  endif()
  if(EXISTS "${tinyvllm_cuda_root}/lib" AND NOT EXISTS "${tinyvllm_cuda_root}/lib64")
    # nvcc looks in lib64, which the pip packages do not have.
    set(CMAKE_CUDA_FLAGS_INIT "-L${tinyvllm_cuda_root}/lib")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${cards})
  set(CMAKE_CUDA_COMPILER ${TINYVLLM_NVCC})
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked below, by its full path
  enable_language(CUDA)
  find_library(TINYVLLM_CUDART libcudart_static.a NO_DEFAULT_PATH
               HINTS ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES} ${tinyvllm_cuda_root}/lib
                     ${tinyvllm_cuda_root}/lib64 ${tinyvllm_cuda_root}/targets/x86_64-linux/lib)
  if(NOT TINYVLLM_CUDART)
    message(FATAL_ERROR "libcudart_static.a is not beside ${TINYVLLM_NVCC}. Run `make cuda`, or "
                        "install the CUDA toolkit as a whole.")
  endif()
  # Nothing else of the toolkit's directories: one may hold a libstdc++ that is not the compiler's.
  set(CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES "")
  set(CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES "")
  list(JOIN cards ", " cards)
  set(tinyvllm_cuda_summary "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cards}")
endif()
