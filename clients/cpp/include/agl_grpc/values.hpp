// Attributes, notes and statistics: named values of the contract, from C++ values and back.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "agl_grpc/v1/common.pb.h"

namespace agl_grpc {

inline void set(v1::AnyValue* to, bool value) {
  to->set_bool_value(value);
}
inline void set(v1::AnyValue* to, int value) {
  to->set_int_value(value);
}
inline void set(v1::AnyValue* to, long value) {
  to->set_int_value(value);
}
inline void set(v1::AnyValue* to, long long value) {
  to->set_int_value(value);
}
inline void set(v1::AnyValue* to, double value) {
  to->set_double_value(value);
}
inline void set(v1::AnyValue* to, const char* value) {
  to->set_string_value(value);
}
inline void set(v1::AnyValue* to, std::string_view value) {
  to->set_string_value(std::string(value));
}
inline void set(v1::AnyValue* to, const std::string& value) {
  to->set_string_value(value);
}
inline void set(v1::AnyValue* to, const v1::AnyValue& value) {
  *to = value;
}

template <typename Value>
void set(v1::AnyValue* to, const std::vector<Value>& values) {
  to->mutable_array_value();
  for (const Value& value : values) set(to->mutable_array_value()->add_values(), value);
}

template <typename Value>
void set(v1::AnyValue* to, const std::map<std::string, Value>& values) {
  to->mutable_kvlist_value();
  for (const auto& [key, value] : values) {
    auto* entry = to->mutable_kvlist_value()->add_values();
    entry->set_key(key);
    set(entry->mutable_value(), value);
  }
}

/// A named value: a bool, a number, a text, a vector or a map with string keys of such; anything else
/// (bytes, nothing, a list of unlike things) as v1::AnyValue.
template <typename Value>
v1::KeyValue value(std::string name, const Value& content) {
  v1::KeyValue made;
  made.set_key(std::move(name));
  set(made.mutable_value(), content);
  return made;
}

using Values = google::protobuf::RepeatedPtrField<v1::KeyValue>;

/// The value of a name, the last of a repeated one; null when there is none.
const v1::AnyValue* find(const Values& values, const std::string& name);

/// Values as a JSON object, for example sampling parameters for a request to a model: bytes as base64.
std::string to_json(const Values& values);

}  // namespace agl_grpc
