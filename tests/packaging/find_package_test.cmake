# Installs this build into an empty folder, then builds and runs examples/find_package against that copy alone.
# cmake -DBUILD_DIR=... -DEXAMPLE_DIR=... -DWORK_DIR=... -P find_package_test.cmake

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}\nended with ${result}:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${WORK_DIR}/prefix")
# Moved after installation: the installed files must not name the folder they were installed to.
file(RENAME "${WORK_DIR}/prefix" "${WORK_DIR}/moved")
run("${CMAKE_COMMAND}" -G Ninja -S "${EXAMPLE_DIR}" -B "${WORK_DIR}/build" "-DCMAKE_PREFIX_PATH=${WORK_DIR}/moved")
run("${CMAKE_COMMAND}" --build "${WORK_DIR}/build")
run("${WORK_DIR}/build/prune_four_values")

if(NOT output STREQUAL "0 -3 2 0\n")
  message(FATAL_ERROR "the example printed \"${output}\", expected \"0 -3 2 0\"")
endif()
