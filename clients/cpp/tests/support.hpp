// What the tests have in common: a real store, checks, and a list of tests that run by themselves.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "agl_grpc/agl_grpc.hpp"

namespace agl_grpc_tests {

namespace v1 = agl_grpc::v1;

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Adds a test to the list.
struct Test {
  Test(const char* name, std::function<void()> body);
};

/// A real store on disk that can be stopped, killed and started again on its port.
class TestStore {
 public:
  explicit TestStore(std::vector<std::string> options = {});
  ~TestStore();
  TestStore(const TestStore&) = delete;
  TestStore& operator=(const TestStore&) = delete;

  const std::string& target() const { return target_; }
  void up();
  void down(int signal);
  agl_grpc::Client client(agl_grpc::ClientOptions options = {}) const {
    return agl_grpc::Client(target_, std::move(options));
  }

 private:
  std::filesystem::path folder_;
  std::string target_;
  std::vector<std::string> options_;
  pid_t process_ = -1;
};

/// A run of its own in a store that all tests share which do not stop it.
class SharedStore {
 public:
  SharedStore();
  /// A client whose helpers use the run.
  agl_grpc::Client client(agl_grpc::ClientOptions options = {}) const;

 private:
  std::string run_;
};

/// A port of the loopback interface on which nobody listens.
std::string free_address();
/// A listener that takes connections and says nothing, while it lives.
class SilentListener {
 public:
  SilentListener();
  ~SilentListener();
  SilentListener(const SilentListener&) = delete;
  SilentListener& operator=(const SilentListener&) = delete;
  const std::string& target() const { return target_; }

 private:
  std::string target_;  // before the socket, whose making writes it
  int socket_;
};

/// Waits until a condition holds.
void eventually(const std::string& what, const std::function<bool()>& holds);

/// The error of a call that has to fail.
agl_grpc::Error error_of(const std::function<void()>& call);

std::vector<std::string> enqueue(const agl_grpc::Client& client, const std::vector<std::string>& inputs,
                                 const std::string& queue = "");
v1::Span span(const std::string& name);
/// A group of an attempt that has begun.
v1::AttemptSpans started(const agl_grpc::Client& client);
v1::AttemptSpans with(v1::AttemptSpans group, const std::vector<v1::Span>& spans);
std::map<std::string, int> stored_names(const agl_grpc::Client& client, const std::string& rollout_id);

template <typename Found, typename Expected>
void equal(const Found& found, const Expected& expected, const char* what, int line) {
  if (found == expected) return;
  std::ostringstream text;
  text << "line " << line << ": " << what << " is " << found << ", not " << expected;
  throw Failed(text.str());
}

inline void holds(bool holds, const std::string& what, int line) {
  if (!holds) throw Failed("line " + std::to_string(line) + ": not so: " + what);
}

}  // namespace agl_grpc_tests

#define EQUAL(found, expected) ::agl_grpc_tests::equal((found), (expected), #found, __LINE__)
#define HOLDS(condition) ::agl_grpc_tests::holds((condition), #condition, __LINE__)
#define TEST(name)                                                 \
  static void name();                                              \
  static const ::agl_grpc_tests::Test test_of_##name(#name, name); \
  static void name()
