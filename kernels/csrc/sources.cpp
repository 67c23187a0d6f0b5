// What the module was built from: the digest that CMakeLists.txt makes of this folder, for native.py to compare.
const char* sources_digest() { return HDFAST_SOURCES; }
