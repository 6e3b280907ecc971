-- Puts the model that a request names into the header x-lingqu-model, so that the route is chosen by it.
-- Runs behind grpc_field_extraction, which has read the name out of the (first) message, and behind
-- json_to_metadata, which has read it out of a REST request.
--
-- Where no model has that name, the route says `unknown` and the answer is made here, since it names the model.
-- Where the chosen route says `pin`, a tensor request that names no version is given one: field 2 of every
-- request of the Open Inference Protocol, appended to the message, since the last occurrence of a field wins.

local EXTRACTED = "envoy.filters.http.grpc_field_extraction"
local REST = "lingqu.rest"

local function first(value)
  if type(value) == "table" then value = value[1] end
  return value
end

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

-- The same for a stream: messages may be split over chunks anywhere.
local function pin_stream(h, suffix)
  local head, left = "", 0
  for chunk in h:bodyChunks() do
    local size = chunk:length()
    local bytes = size > 0 and chunk:getBytes(0, size) or ""
    local out, at = {}, 1
    while at <= #bytes do
      if left == 0 then
        local take = math.min(5 - #head, #bytes - at + 1)
        head = head .. bytes:sub(at, at + take - 1)
        at = at + take
        if #head == 5 then
          local flags, a, b, c, d = head:byte(1, 5)
          left = ((a * 256 + b) * 256 + c) * 256 + d
          out[#out + 1] = prefix(flags, left + #suffix)
          head = ""
          if left == 0 then out[#out + 1] = suffix end
        end
      else
        local take = math.min(left, #bytes - at + 1)
        out[#out + 1] = bytes:sub(at, at + take - 1)
        at, left = at + take, left - take
        if left == 0 then out[#out + 1] = suffix end
      end
    end
    if size > 0 then chunk:setBytes(table.concat(out)) end
  end
end

-- NOT_FOUND as a trailers-only gRPC response, with google.rpc.Status in its details: code, message, and the
-- serialised `details` that snapshot.py puts in.
local NOT_FOUND_DETAILS = "@MODEL_NOT_FOUND_DETAILS@"

local function refuse_unknown(h, name)
  local message = 'model "' .. name .. '" does not exist or takes no traffic'
  local status = "\8\5\18" .. string.char(#message) .. message .. NOT_FOUND_DETAILS
  h:respond({
    [":status"] = "200",
    ["content-type"] = "application/grpc",
    ["grpc-status"] = "5",
    ["grpc-message"] = message,
    ["grpc-status-details-bin"] = h:base64Escape(status),
  }, "")
end

-- Only names the registry would accept; anything else could not exist, and must not reach a header.
local function acceptable(name)
  return type(name) == "string" and #name > 0 and #name <= 64 and not name:find("[^%w%._%-]")
end

-- A REST request that names no model goes where it was going: inference says what is wrong with it.
local function route_rest(h, name)
  if not acceptable(name) then return end
  h:headers():replace("x-lingqu-model", name)
  h:clearRouteCache()
end

function envoy_on_request(h)
  local metadata = h:streamInfo():dynamicMetadata()
  local found = metadata:get(EXTRACTED)
  if found == nil then
    local rest = metadata:get(REST)
    if rest ~= nil then route_rest(h, rest["model"]) end
    return
  end
  local name = first(found["model"] or found["model_name"] or found["name"])
  if not acceptable(name) then name = "<invalid>" end
  h:headers():replace("x-lingqu-model", name)
  h:clearRouteCache()
  local route = h:metadata()
  if route:get("unknown") then return refuse_unknown(h, name) end
  local pin = route:get("pin")
  if pin == nil then return end
  local version = first(found["model_version"] or found["version"])
  if version ~= nil and version ~= "" then return end
  local suffix = string.char(0x12, #pin) .. pin
  if h:headers():get(":path"):find("ModelStreamInfer", 1, true) then
    pin_stream(h, suffix)
  else
    pin_unary(h, suffix)
  end
end
