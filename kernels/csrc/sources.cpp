// The sources the module was built from, as the digest of this folder by CMakeLists.txt, for native.py to compare.
const char* sources_digest() { return HDFAST_SOURCES; }
