// Marks a function that the shared library shows to the outside; everything else in it is hidden.
#ifndef DIABLO_ORT_EXPORT_H
#define DIABLO_ORT_EXPORT_H

#ifdef _WIN32
#define DIABLO_EXPORT extern "C" __declspec(dllexport)
#else
#define DIABLO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#endif
