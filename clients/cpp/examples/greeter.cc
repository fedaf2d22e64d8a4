// An agent that needs no model: it greets, notes what it said as a span, and is rewarded for being brief.
//
//     greeter HOST:PORT RUN [CONCURRENCY]
//
// gives each rollout of the run, whose input is a JSON text, a reward between 0 and 1; it leaves at Ctrl-C.
#include <agl_grpc/agl_grpc.hpp>
#include <algorithm>
#include <cstdlib>
#include <iostream>

namespace {

void agent(agl_grpc::Task& task) {
  const std::string greeting = "Hello, " + task.input() + "!";
  task.emit("greeting",
            {agl_grpc::value("text", greeting), agl_grpc::value("length", static_cast<long>(greeting.size()))});
  task.reward(1.0 / static_cast<double>(std::max<size_t>(1, greeting.size() / 16)));
}

}  // namespace

int main(int count, char** arguments) {
  const int concurrency = count > 3 ? std::atoi(arguments[3]) : 4;
  if (count < 3 || concurrency < 1) {
    std::cerr << "usage: greeter HOST:PORT RUN [CONCURRENCY, at least 1]\n";
    return 2;
  }
  try {
    agl_grpc::ClientOptions options;
    options.run = arguments[2];
    agl_grpc::WorkerOptions work;
    work.work.credits = concurrency;
    agl_grpc::Worker(agl_grpc::Client(arguments[1], options), agent, work).run();
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
