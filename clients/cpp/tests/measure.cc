// Measures the client against a store: measure HOST:PORT SPANS ROUNDS, for benchmarks/bench_clients.py.
//
// Prints one JSON object: spans on disk a second, sent in groups of 100 with 64 groups under way, and the
// milliseconds of each round trip of a lease, from the credit to the completion on disk.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <iostream>

#include "agl_grpc/agl_grpc.hpp"

namespace {

namespace v1 = agl_grpc::v1;
using clock_type = std::chrono::steady_clock;

constexpr int kGroup = 100;
constexpr size_t kUnderWay = 64;
constexpr int kWarmUp = 50;

std::string bytes_of(uint64_t number, size_t size) {
  std::string bytes(size, '\x01');
  for (size_t index = 0; index < 8; index++) bytes[size - 1 - index] = static_cast<char>(number >> (8 * index));
  return bytes;
}

v1::AttemptSpans group_of(const v1::AttemptedRollout& at, uint64_t first) {
  v1::AttemptSpans group;
  group.set_rollout_id(at.rollout().rollout_id());
  group.set_attempt_id(at.attempt().attempt_id());
  for (uint64_t number = first; number < first + kGroup; number++) {
    auto* span = group.add_spans();
    span->set_trace_id(bytes_of(1, 16));
    span->set_span_id(bytes_of(number, 8));
    span->set_name("step");
    span->set_start_time_unix_nano(1'700'000'000'000'000'000 + number);
    span->set_end_time_unix_nano(1'700'000'000'000'001'000 + number);
    *span->add_attributes() = agl_grpc::value("number", static_cast<long>(number));
    *span->add_attributes() = agl_grpc::value("text", "the quick brown fox");
  }
  return group;
}

double spans_per_second(const agl_grpc::Client& client, uint64_t count) {
  v1::StartRolloutRequest start;
  start.mutable_rollout();
  const auto at = client.call(&agl_grpc::Store::StartRollout, start).rollout();
  const auto spans = client.spans();
  spans->send(group_of(at, 1));
  std::deque<std::future<agl_grpc::SpanAck>> under_way;
  const auto settle = [&] {
    if (!under_way.front().get().rejected.empty()) throw std::runtime_error("a span was refused");
    under_way.pop_front();
  };
  const auto begun = clock_type::now();
  for (uint64_t first = 1 + kGroup; first <= count; first += kGroup) {
    if (under_way.size() == kUnderWay) settle();
    std::vector<v1::AttemptSpans> groups;
    groups.push_back(group_of(at, first));
    under_way.push_back(spans->submit(std::move(groups)));
  }
  while (!under_way.empty()) settle();
  const std::chrono::duration<double> seconds = clock_type::now() - begun;
  spans->close();
  return static_cast<double>(count - kGroup) / seconds.count();
}

std::vector<double> round_trips(const agl_grpc::Client& client, int count) {
  client.enqueue(std::vector<v1::RolloutSpec>(static_cast<size_t>(count + kWarmUp)));
  agl_grpc::LeaseOptions options;
  options.worker_id = "measure-cpp";
  const auto stream = client.lease(options);
  std::vector<double> found;
  for (int round = 0; round < count + kWarmUp; round++) {
    const auto begun = clock_type::now();
    stream->grant(1);
    for (bool delivered = false; !delivered;) {
      auto event = stream->next(std::chrono::seconds(30));
      if (!event) throw std::runtime_error("no work came within 30 s");
      if (const auto* work = std::get_if<agl_grpc::Delivered>(&*event)) {
        v1::Completion completion;
        completion.set_status(v1::ATTEMPT_STATUS_SUCCEEDED);
        stream->complete(work->work.lease(), completion);
        delivered = true;
      }
    }
    const std::chrono::duration<double, std::milli> took = clock_type::now() - begun;
    if (round >= kWarmUp) found.push_back(took.count());
  }
  stream->close();
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: measure HOST:PORT SPANS ROUNDS\n";
    return 2;
  }
  try {
    const agl_grpc::Client client(arguments[1]);
    const double rate = spans_per_second(client, std::strtoull(arguments[2], nullptr, 10));
    const auto rounds = round_trips(client, std::atoi(arguments[3]));
    std::cout << "{\"spans_per_second\": " << rate << ", \"round_trips_ms\": [";
    for (size_t index = 0; index < rounds.size(); index++) std::cout << (index ? ", " : "") << rounds[index];
    std::cout << "]}" << std::endl;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
