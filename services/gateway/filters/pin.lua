-- A tensor request that names no version gets the one its route says: field 2 of every request of the Open
-- Inference Protocol, appended to the message, since the last occurrence of a field wins. Runs only on routes whose
-- `pin` says so, behind grpc_field_extraction.

-- Length prefix of a gRPC message (1 byte of flags, 4 of length) for a message that grew by `extra` bytes.
local function prefix(flags, length)
  return string.char(flags, math.floor(length / 16777216) % 256, math.floor(length / 65536) % 256,
                     math.floor(length / 256) % 256, length % 256)
end

local function pin_unary(h, suffix)
  local body = h:body(true)
  local size = body:length()
  if size < 5 then return end
  local bytes = body:getBytes(0, size)
  local a, b, c, d = bytes:byte(2, 5)
  local length = ((a * 256 + b) * 256 + c) * 256 + d
  if size ~= length + 5 then return end
  body:setBytes(prefix(bytes:byte(1), length + #suffix) .. bytes:sub(6) .. suffix)
end

function envoy_on_request(h)
  local found = h:streamInfo():dynamicMetadata():get("envoy.filters.http.grpc_field_extraction")
  local version = found and (found["model_version"] or found["version"])
  if type(version) == "table" then version = version[1] end
  if version ~= nil and version ~= "" then return end
  local pin = h:metadata():get("pin")
  pin_unary(h, string.char(0x12, #pin) .. pin)
end
