-- Answers a request whose model is not routed, since only a script can put the name into the answer. Runs only on
-- the route for such requests, behind grpc_field_extraction. Answers are trailers-only gRPC responses.

local function respond(h, status, message, details)
  h:respond({
    [":status"] = "200",
    ["content-type"] = "application/grpc",
    ["grpc-status"] = status,
    ["grpc-message"] = message,
    ["grpc-status-details-bin"] = details,
  }, "")
end

-- Only names the registry would accept: anything else could not exist, and must not reach a header.
local function acceptable(name)
  return type(name) == "string" and #name > 0 and #name <= 64 and not name:find("[^%w%._%-]")
end

function envoy_on_request(h)
  local found = h:streamInfo():dynamicMetadata():get("envoy.filters.http.grpc_field_extraction")
  if found == nil then return end -- what names no model is no method of ours; the route answers that
  local names = found["model"] or found["model_name"] or found["name"]
  -- A field that is sent twice has two values, and who reads the message takes the last.
  local name = type(names) == "table" and #names == 1 and names[1] or names
  if type(name) == "string" then name = name:match("^([^@]+)@[%w%-]+$") or name end
  if not acceptable(name) then
    return respond(h, "3", "@INVALID_MESSAGE@", "@INVALID_STATUS@")
  end
  local message = 'model "' .. name .. '" does not exist or takes no traffic'
  -- google.rpc.Status: code 5, the message, and the serialised details that model.py puts in.
  local status = "\8\5\18" .. string.char(#message) .. message .. "@NOT_FOUND_DETAILS@"
  respond(h, "5", message, h:base64Escape(status))
end
