// The same in C++, with the library opened when it is needed: the program is built and started also where there is no rdmaxfer.
//
//     c++ -std=c++17 capture.cpp $(rdmaxfer config --cflags) -ldl -o capture
//     ./capture "$(rdmaxfer config --library)" camera 100

#include <dlfcn.h>

#include <cstdint>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

#include <rdmaxfer.h>

class Library {
  public:
    explicit Library(const char *path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (!handle_)
            throw std::runtime_error(dlerror());
        if (find<decltype(rdmaxfer_abi)>("rdmaxfer_abi")() != RDMAXFER_ABI)
            throw std::runtime_error("the library is of another version than rdmaxfer.h");
    }
    template <typename Function> Function *find(const char *name) const {
        if (void *found = dlsym(handle_, name))
            return reinterpret_cast<Function *>(found);
        throw std::runtime_error(dlerror());
    }

  private:
    void *handle_;
};

class Ring {
  public:
    Ring(const Library &library, const std::string &name)
        : detach_(library.find<decltype(rdmaxfer_detach)>("rdmaxfer_detach")),
          reserve_(library.find<decltype(rdmaxfer_reserve)>("rdmaxfer_reserve")),
          publish_(library.find<decltype(rdmaxfer_publish)>("rdmaxfer_publish")),
          flush_(library.find<decltype(rdmaxfer_flush)>("rdmaxfer_flush")),
          error_(library.find<decltype(rdmaxfer_error)>("rdmaxfer_error")), ring_(nullptr, detach_) {
        rdmaxfer_ring *ring = nullptr;
        check(library.find<decltype(rdmaxfer_attach)>("rdmaxfer_attach")(RDMAXFER_ABI, name.c_str(), 30000, &ring));
        ring_.reset(ring);
    }
    rdmaxfer_slot reserve() {
        rdmaxfer_slot slot;
        check(reserve_(ring_.get(), 30000, &slot));
        return slot;
    }
    void publish(const rdmaxfer_slot &slot, const rdmaxfer_frame &frame) { check(publish_(ring_.get(), &slot, &frame)); }
    void flush() { check(flush_(ring_.get(), 30000)); }

  private:
    void check(int status) const {
        if (status)
            throw std::runtime_error(error_());
    }
    decltype(rdmaxfer_detach) *detach_;
    decltype(rdmaxfer_reserve) *reserve_;
    decltype(rdmaxfer_publish) *publish_;
    decltype(rdmaxfer_flush) *flush_;
    decltype(rdmaxfer_error) *error_;
    std::unique_ptr<rdmaxfer_ring, decltype(rdmaxfer_detach) *> ring_;
};

int main(int argc, char **argv) try {
    const Library library(argc > 1 ? argv[1] : "librdmaxfer_shm.so");
    const std::string name = argc > 2 ? argv[2] : "camera";
    const int count = argc > 3 ? std::stoi(argv[3]) : 100;
    constexpr int width = 640, height = 480;

    Ring ring(library, name);
    for (int number = 0; number < count; number++) {
        const rdmaxfer_slot slot = ring.reserve();
        auto *pixels = static_cast<std::uint16_t *>(slot.data); // where a camera would put its picture
        for (int i = 0; i < width * height; i++)
            pixels[i] = static_cast<std::uint16_t>(i + number);
        const std::string metadata = "{\"number\": " + std::to_string(number) + "}";
        rdmaxfer_frame frame{};
        frame.dtype = "u2";
        frame.ndim = 2;
        frame.shape[0] = height;
        frame.shape[1] = width;
        frame.metadata = metadata.c_str();
        ring.publish(slot, frame);
    }
    ring.flush();
    std::cout << "filled " << count << " frames, all released\n";
} catch (const std::exception &error) {
    std::cerr << "capture: " << error.what() << "\n";
    return 1;
}
