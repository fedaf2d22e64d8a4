// Errors of calls, with the contract's reasons.
#pragma once

#include <grpcpp/support/status.h>

#include <chrono>
#include <map>
#include <stdexcept>
#include <string>

#include "agl_grpc/v1/common.pb.h"
#include "agl_grpc/v1/error_reason.pb.h"

namespace agl_grpc {

/// Largest message that a client sends or takes.
constexpr int kMaxMessageBytes = 64 << 20;

/// A call that the store refused, or for which it could not be reached; what() is one line for people.
class Error : public std::runtime_error {
 public:
  Error(grpc::StatusCode code, std::string reason, std::string message);

  /// The gRPC status.
  grpc::StatusCode code;
  /// The name from the contract's ErrorReason without its prefix; empty when there is none.
  std::string reason;
  /// Machine-readable details, for example the path of a field.
  std::map<std::string, std::string> info;
  /// How long the store asks to wait before another try; 0 when it does not.
  std::chrono::nanoseconds retry_after{0};

  /// Whether the store gave this reason.
  bool is(v1::ErrorReason reason) const;

  /// Whether another try may help: the store is away or drains, a connection broke, or the store is
  /// overloaded and said when to come back. CANCELLED without a reason is a server that goes away in mid-call.
  bool transient() const;
};

/// The error of a failed call; ``target`` is named when the store cannot be reached.
Error error_from(const grpc::Status& status, const std::string& target);

/// The error of one item of a batched call.
Error error_from(const v1::ItemStatus& item);

}  // namespace agl_grpc
