// Names made of the instruction set that a source is compiled for (see CMakeLists.txt).
#pragma once

#define ANABRANCH_PASTE(a, b) a##b
#define ANABRANCH_NAMED(a, b) ANABRANCH_PASTE(a, b)
#define ANABRANCH_QUOTE(a) #a
#define ANABRANCH_STRING(a) ANABRANCH_QUOTE(a)
