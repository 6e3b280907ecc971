-- What scripts refuse, made by versions.py of the suite's errors: for gRPC the code, and the serialised details of
-- google.rpc.Status; for REST the status and the body. <model> and <version> stand for the names.
local REFUSALS = {--@REFUSALS@
}

-- `name` and `version` are of letters, digits, '.', '_' and '-': they need no escaping.
local function refuse(h, refusal, name, version)
  local function filled(text) return (text:gsub("<(%a+)>", { model = name, version = version })) end
  if (h:headers():get("content-type") or ""):find("application/grpc", 1, true) ~= 1 then
    local headers = { [":status"] = refusal.status, ["content-type"] = "application/json" }
    return h:respond(headers, filled(refusal.body))
  end
  local message = filled(refusal.message)
  local status = "\8" .. varint(refusal.code) .. field(2, message) .. refusal.details
  h:respond({
    [":status"] = "200",
    ["content-type"] = "application/grpc",
    ["grpc-status"] = tostring(refusal.code),
    ["grpc-message"] = message,
    ["grpc-status-details-bin"] = h:base64Escape(status),
  }, "")
end
