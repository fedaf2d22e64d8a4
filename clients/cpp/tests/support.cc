#include "support.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <thread>

namespace agl_grpc_tests {
namespace {

std::vector<std::pair<std::string, std::function<void()>>>& all_tests() {
  static std::vector<std::pair<std::string, std::function<void()>>> tests;
  return tests;
}

int listening(std::string* target) {
  const int made = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (made < 0 || bind(made, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(made, 16) != 0 ||
      getsockname(made, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    throw Failed("no port is to be had");
  }
  *target = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  return made;
}

std::vector<std::string> command() {
  const char* given = std::getenv("AGL_GRPC_COMMAND");
  std::istringstream text(given == nullptr ? "agl-grpc" : given);
  std::vector<std::string> words;
  for (std::string word; text >> word;) words.push_back(word);
  return words;
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream stream(path);
  std::stringstream text;
  text << stream.rdbuf();
  return text.str();
}

}  // namespace

Test::Test(const char* name, std::function<void()> body) {
  all_tests().emplace_back(name, std::move(body));
}

TestStore::TestStore(std::vector<std::string> options) : target_(free_address()), options_(std::move(options)) {
  std::string pattern = (std::filesystem::temp_directory_path() / "agl-cpp-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw Failed("no temporary folder is to be had");
  folder_ = pattern;
  up();
}

TestStore::~TestStore() {
  down(SIGTERM);
  std::error_code ignored;  // a folder that stays behind is no failure of the client
  std::filesystem::remove_all(folder_, ignored);
}

void TestStore::up() {
  auto words = command();
  const std::string port = target_.substr(target_.rfind(':') + 1);
  for (const auto& word : {std::string("store"), std::string("serve"), std::string("--database"),
                           (folder_ / "agl.db").string(), std::string("--port"), port, std::string("--no-http")}) {
    words.push_back(word);
  }
  words.insert(words.end(), options_.begin(), options_.end());
  std::vector<char*> arguments;
  for (auto& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const auto log = folder_ / "log";
  const int output = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  process_ = fork();
  if (process_ == 0) {
    dup2(output, 1);
    dup2(output, 2);
    unsetenv("LD_LIBRARY_PATH");  // that of this program's libraries
    execvp(arguments[0], arguments.data());
    _exit(127);
  }
  close(output);
  agl_grpc::CallOptions once;
  once.timeout = std::chrono::seconds(1);
  eventually("the store serves\n" + read_file(log), [&] {
    if (waitpid(process_, nullptr, WNOHANG) == process_) {
      process_ = -1;
      throw Failed("the store ended:\n" + read_file(log));
    }
    try {
      client().call(&agl_grpc::Store::GetServerInfo, v1::GetServerInfoRequest(), once);
      return true;
    } catch (const agl_grpc::Error& error) {
      return error.is(v1::ERROR_REASON_UNAUTHENTICATED);
    }
  });
}

void TestStore::down(int signal) {
  if (process_ < 0) return;
  kill(process_, signal);
  waitpid(process_, nullptr, 0);
  process_ = -1;
}

namespace {

const TestStore& shared_store() {
  static const TestStore store;
  return store;
}

}  // namespace

SharedStore::SharedStore() : run_("run-" + agl_grpc::new_id()) {
  v1::CreateRunRequest request;
  request.mutable_run()->set_run_id(run_);
  shared_store().client().call(&agl_grpc::Store::CreateRun, request);
}

agl_grpc::Client SharedStore::client(agl_grpc::ClientOptions options) const {
  options.run = run_;
  return shared_store().client(std::move(options));
}

std::string free_address() {
  std::string target;
  close(listening(&target));
  return target;
}

SilentListener::SilentListener() : socket_(listening(&target_)) {}
SilentListener::~SilentListener() {
  close(socket_);
}

void eventually(const std::string& what, const std::function<bool()>& holds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!holds()) {
    if (std::chrono::steady_clock::now() > end) throw Failed("not within 60 s: " + what);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

agl_grpc::Error error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const agl_grpc::Error& error) {
    return error;
  }
  throw Failed("no error came");
}

std::vector<std::string> enqueue(const agl_grpc::Client& client, const std::vector<std::string>& inputs,
                                 const std::string& queue) {
  std::vector<v1::RolloutSpec> specs;
  for (const auto& input : inputs) {
    v1::RolloutSpec spec;
    *spec.mutable_input() = client.payload(input);
    spec.set_queue(queue);
    specs.push_back(std::move(spec));
  }
  std::vector<std::string> ids;
  for (const auto& rollout : client.enqueue(std::move(specs))) ids.push_back(rollout.rollout_id());
  return ids;
}

v1::Span span(const std::string& name) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto nanos = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
  v1::Span made;
  const std::string id = agl_grpc::new_id();
  made.set_trace_id(id.substr(0, 16));
  made.set_span_id(id.substr(16, 8));
  made.set_name(name);
  made.set_start_time_unix_nano(nanos);
  made.set_end_time_unix_nano(nanos);
  return made;
}

v1::AttemptSpans started(const agl_grpc::Client& client) {
  v1::StartRolloutRequest request;
  request.set_run_id(client.run());
  request.mutable_rollout()->mutable_input()->set_data("{}");
  const auto begun = client.call(&agl_grpc::Store::StartRollout, request).rollout();
  v1::AttemptSpans group;
  group.set_rollout_id(begun.rollout().rollout_id());
  group.set_attempt_id(begun.attempt().attempt_id());
  return group;
}

v1::AttemptSpans with(v1::AttemptSpans group, const std::vector<v1::Span>& spans) {
  for (const auto& one : spans) *group.add_spans() = one;
  return group;
}

std::map<std::string, int> stored_names(const agl_grpc::Client& client, const std::string& rollout_id) {
  std::map<std::string, int> names;
  v1::ExportSpansRequest request;
  request.set_run_id(client.run());
  request.add_rollout_ids(rollout_id);
  client.export_spans(request, [&](const v1::ExportSpansResponse& page) {
    for (const auto& stored : page.spans()) names[stored.span().name()]++;
    return true;
  });
  return names;
}

}  // namespace agl_grpc_tests

// Runs all tests, or those whose names are given.
int main(int count, char** arguments) {
  const std::vector<std::string> chosen(arguments + 1, arguments + count);
  int passed = 0, failed = 0;
  for (const auto& [name, body] : agl_grpc_tests::all_tests()) {
    if (!chosen.empty() && std::find(chosen.begin(), chosen.end(), name) == chosen.end()) continue;
    try {
      body();
      passed++;
      std::cout << "ok " << name << std::endl;
    } catch (const std::exception& error) {
      failed++;
      std::cout << "FAILED " << name << ": " << error.what() << std::endl;
    }
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed > 0 || passed == 0 ? 1 : 0;
}
