#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <atomic>
#include <csignal>
#include <future>
#include <thread>

#include "support.hpp"

using namespace agl_grpc_tests;
using agl_grpc::Store;

namespace {

agl_grpc::ClientOptions impatient(std::chrono::milliseconds timeout) {
  agl_grpc::ClientOptions options;
  options.retry = {timeout, std::chrono::milliseconds(1), std::chrono::milliseconds(50)};
  return options;
}

// A unary call by name, to ask for what the contract does not have.
grpc::Status call_by_name(const agl_grpc::Client& client, const std::string& path) {
  grpc::ClientContext context;
  client.authorise(&context);
  agl_grpc::limit(&context, std::chrono::seconds(20));
  grpc::GenericStub stub(client.channel());
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(&context, path, grpc::ByteBuffer(), &queue);
  grpc::ByteBuffer response;
  grpc::Status status;
  call->StartCall();
  call->Finish(&response, &status, &status);
  void* tag = nullptr;
  bool good = false;
  queue.Next(&tag, &good);
  return status;
}

// A server of a later contract, of which this client knows only the question what it is.
struct LaterServer : v1::StoreService::Service {
  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::GetServerInfoResponse* answer) override {
    answer->set_server_version("9.0");
    answer->set_contract_version("v9");
    return grpc::Status::OK;
  }
  grpc::Status EnqueueRollouts(grpc::ServerContext*, const v1::EnqueueRolloutsRequest*,
                               v1::EnqueueRolloutsResponse*) override {
    enqueued++;
    return {grpc::StatusCode::UNIMPLEMENTED, "gone"};
  }
  std::atomic<int> enqueued{0};
};

}  // namespace

TEST(inputs_come_back_as_they_were_put_in) {
  const SharedStore store;
  const auto client = store.client();
  const std::string small = R"({"q":"1+1","n":[1,2.5,null]})", large = "\"" + std::string(3 << 20, 'x') + "\"";
  const auto ids = enqueue(client, {small, large});
  for (size_t index = 0; index < ids.size(); index++) {
    v1::GetRolloutRequest request;
    request.set_rollout_id(ids[index]);
    const auto read = client.call(&Store::GetRollout, request);
    HOLDS(client.load(read.rollout().rollout().input()) == (index == 0 ? small : large));
  }
}

TEST(errors_carry_reason_and_info) {
  const SharedStore store;
  const auto client = store.client();
  v1::GetRolloutRequest request;
  request.set_rollout_id("ro-none");
  auto error = error_of([&] { client.call(&Store::GetRollout, request); });
  EQUAL(error.code, grpc::StatusCode::NOT_FOUND);
  HOLDS(error.is(v1::ERROR_REASON_ENTITY_NOT_FOUND));
  HOLDS(!error.is(v1::ERROR_REASON_LEASE_LOST));
  EQUAL(error.info["id"], "ro-none");
  EQUAL(error.info["entity"], "rollout");
  v1::RolloutSpec spec;
  spec.set_priority(5000);
  HOLDS(!error_of([&] { client.enqueue({spec}); }).info["field"].empty());
  HOLDS(std::string(error_of([&] { client.enqueue({spec}); }).what()).find('\n') == std::string::npos);
}

TEST(a_wrong_credential_is_refused_on_calls_and_streams) {
  const SharedStore store;
  agl_grpc::ClientOptions options;
  options.credential = "agl1.bm9uZQ.bm9uZQ";
  const auto client = store.client(options);
  HOLDS(error_of([&] { client.enqueue({v1::RolloutSpec()}); }).is(v1::ERROR_REASON_UNAUTHENTICATED));
  const auto spans = client.spans();
  v1::AttemptSpans group;
  group.set_rollout_id("ro-x");
  group.set_attempt_id("at-x");
  HOLDS(error_of([&] { spans->send(with(group, {span("a")})); }).is(v1::ERROR_REASON_UNAUTHENTICATED));
  agl_grpc::LeaseOptions work;
  work.worker_id = "w";
  const auto stream = client.lease(work);
  HOLDS(error_of([&] {
          while (stream->next(std::chrono::seconds(30))) {
          }
        }).is(v1::ERROR_REASON_UNAUTHENTICATED));
}

TEST(a_message_over_the_limit_is_not_tried_again) {
  const SharedStore store;
  const auto client = store.client();
  v1::RolloutSpec spec;
  spec.mutable_input()->set_data(std::string(65 << 20, 'x'));
  const auto begun = std::chrono::steady_clock::now();
  const auto error = error_of([&] { client.enqueue({spec}); });
  EQUAL(error.code, grpc::StatusCode::RESOURCE_EXHAUSTED);
  HOLDS(error.is(v1::ERROR_REASON_MESSAGE_TOO_LARGE));
  EQUAL(error.info.at("limit_bytes"), "67108864");
  HOLDS(!error.transient());
  HOLDS(std::chrono::steady_clock::now() - begun < std::chrono::seconds(20));
}

TEST(what_a_server_lacks_is_said) {
  const SharedStore store;
  const auto client = store.client();
  EQUAL(client.require({"blobs"}).contract_version(), "v1");
  auto error = error_of([&] { client.require({"blobs", "telepathy", "magic"}); });
  HOLDS(error.is(v1::ERROR_REASON_METHOD_UNIMPLEMENTED));
  EQUAL(error.info["missing"], "telepathy,magic");
  const auto status = call_by_name(client, "/agl_grpc.v1.StoreService/NotYetThere");
  error = agl_grpc::error_from(status, client.target());
  EQUAL(error.code, grpc::StatusCode::UNIMPLEMENTED);
  HOLDS(!error.transient());
}

TEST(a_server_of_another_version_is_named_and_asked_once) {
  LaterServer later;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&later);
  const auto server = builder.BuildAndStart();
  const agl_grpc::Client client("127.0.0.1:" + std::to_string(port), impatient(std::chrono::seconds(20)));
  auto error = error_of([&] { client.require(); });
  HOLDS(error.is(v1::ERROR_REASON_METHOD_UNIMPLEMENTED));
  EQUAL(error.info["contract_version"], "v9");
  HOLDS(std::string(error.what()).find("9.0") != std::string::npos);
  // What it does not serve is tried once, and streams end instead of being opened for ever.
  EQUAL(error_of([&] { client.enqueue({v1::RolloutSpec()}); }).code, grpc::StatusCode::UNIMPLEMENTED);
  EQUAL(later.enqueued.load(), 1);
  agl_grpc::LeaseOptions work;
  work.worker_id = "w";
  const auto stream = client.lease(work);
  const auto refused = error_of([&] {
    while (stream->next(std::chrono::seconds(30))) {
    }
  });
  EQUAL(refused.code, grpc::StatusCode::UNIMPLEMENTED);
  v1::AttemptSpans group;
  group.set_rollout_id("ro-x");
  group.set_attempt_id("at-x");
  EQUAL(error_of([&] { client.spans()->send(with(group, {span("a")})); }).code, grpc::StatusCode::UNIMPLEMENTED);
}

TEST(fields_of_a_newer_contract_survive) {
  const std::string wire(
      "\x0a\x01"
      "a\xfa\x3e\x02hi",
      8);
  v1::Rollout rollout;
  HOLDS(rollout.ParseFromString(wire));
  EQUAL(rollout.rollout_id(), "a");
  HOLDS(rollout.SerializeAsString() == wire);
}

TEST(values_are_written_and_read) {
  agl_grpc::Values values;
  *values.Add() = agl_grpc::value("list", std::vector<std::string>{"a", "ü\"\n"});
  *values.Add() = agl_grpc::value("map", std::map<std::string, long>{{"n", 1L << 60}});
  *values.Add() = agl_grpc::value("yes", true);
  *values.Add() = agl_grpc::value("half", 0.5);
  *values.Add() = agl_grpc::value("none", v1::AnyValue());
  EQUAL(agl_grpc::to_json(values),
        "{\"half\":0.5,\"list\":[\"a\",\"ü\\\"\\n\"],\"map\":{\"n\":1152921504606846976},\"none\":null,\"yes\":true}");
  EQUAL(agl_grpc::find(values, "half")->double_value(), 0.5);
  HOLDS(agl_grpc::find(values, "other") == nullptr);
}

TEST(calls_are_tried_again_while_the_store_restarts_and_count_once) {
  TestStore store;
  const auto client = store.client();
  v1::CreateRunRequest run;
  run.mutable_run()->set_run_id("again");
  store.down(SIGKILL);
  auto made = std::async(std::launch::async, [&] { return client.call(&Store::CreateRun, run); });
  store.up();
  EQUAL(made.get().run().run_id(), "again");
  run.set_request_id("fixed");
  run.mutable_run()->set_run_id("other");
  client.call(&Store::CreateRun, run);
  EQUAL(client.call(&Store::CreateRun, run).run().run_id(), "other");
}

TEST(a_watch_goes_on_without_a_gap_or_a_repeat) {
  TestStore store;
  const auto client = store.client();
  v1::WatchResourcesRequest watch;
  watch.set_cursor(client.call(&Store::GetLatestResources, v1::GetLatestResourcesRequest()).position());
  std::vector<int64_t> seen;
  auto watched = std::async(std::launch::async, [&] {
    client.watch_resources(watch, [&](const v1::WatchResourcesResponse& found) {
      for (const auto& set : found.resources()) seen.push_back(set.version());
      return seen.size() < 6;
    });
  });
  v1::PublishResourcesRequest publish;
  publish.set_resources_id("rs-watch");
  for (int number = 0; number < 6; number++) {
    if (number == 3) {
      store.down(SIGKILL);
      store.up();
    }
    client.call(&Store::PublishResources, publish);
  }
  watched.get();
  HOLDS(seen == (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
}

TEST(a_watch_ends_when_it_is_stopped_or_its_time_is_over) {
  const SharedStore store;
  const auto client = store.client();
  agl_grpc::CallOptions options;
  const auto never = [](const v1::WatchRolloutsResponse&) { return true; };
  auto watched = std::async(std::launch::async, [&] { client.watch_rollouts({}, never, options); });
  options.stop.request();
  watched.get();
  agl_grpc::CallOptions limited;
  limited.timeout = std::chrono::milliseconds(300);
  const auto error = error_of([&] { client.watch_rollouts({}, never, limited); });
  EQUAL(error.code, grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST(a_store_that_is_not_there_ends_by_the_deadline) {
  const SilentListener silent;
  for (const auto& target : {free_address(), silent.target()}) {
    const agl_grpc::Client client(target, impatient(std::chrono::milliseconds(400)));
    const auto begun = std::chrono::steady_clock::now();
    const auto error = error_of([&] { client.call(&Store::GetServerInfo, v1::GetServerInfoRequest()); });
    HOLDS(std::string(error.what()).find("cannot be reached") != std::string::npos);
    const auto watch = error_of([&] { client.watch_attempts({}, [](const auto&) { return true; }); });
    HOLDS(std::string(watch.what()).find("cannot be reached") != std::string::npos);
    HOLDS(std::chrono::steady_clock::now() - begun < std::chrono::seconds(5));
  }
  for (const char* target : {"nonsense", ":4747", "host:", "host:port"}) {
    try {
      agl_grpc::Client client(target);
      throw Failed(std::string(target) + " was taken");
    } catch (const std::invalid_argument& error) {
      HOLDS(std::string(error.what()).find("host:port") != std::string::npos);
    }
  }
}

TEST(a_call_that_is_stopped_ends_at_once) {
  const SilentListener silent;
  const agl_grpc::Client client(silent.target());
  agl_grpc::CallOptions options;
  auto called = std::async(std::launch::async, [&] {
    return error_of([&] { client.call(&Store::GetServerInfo, v1::GetServerInfoRequest(), options); });
  });
  options.stop.request();
  EQUAL(called.get().code, grpc::StatusCode::CANCELLED);
}
