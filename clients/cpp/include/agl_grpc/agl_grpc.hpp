// All of the client.
#pragma once

#include "agl_grpc/client.hpp"
#include "agl_grpc/error.hpp"
#include "agl_grpc/lease_stream.hpp"
#include "agl_grpc/span_streamer.hpp"
#include "agl_grpc/stop.hpp"
#include "agl_grpc/values.hpp"
#include "agl_grpc/worker.hpp"
