-- Refuses a request for a model that the key is not for. Runs only for keys that say which models they are for,
-- behind grpc_field_extraction and json_to_metadata; a request that names no model, or several, reaches none.

-- Whether one of the patterns, with spaces between them, covers the name; '*' stands for any text.
local function covered(patterns, name)
  for pattern in patterns:gmatch("%S+") do
    local first, rest = pattern:match("^([^*]*)(.*)$")
    local at = #first + 1
    local fits = name:sub(1, #first) == first
    for middle in rest:gmatch("%*([^*]*)%f[*]") do
      local _, stop = name:find(middle, at, true)
      fits = fits and stop ~= nil
      at = (stop or #name) + 1
    end
    local last = rest:match("([^*]*)$")
    if rest == "" then
      fits = fits and at == #name + 1
    else
      fits = fits and #name - #last + 1 >= at and name:sub(#name - #last + 1) == last
    end
    if fits then return true end
  end
  return false
end

function envoy_on_request(h)
  local metadata = h:streamInfo():dynamicMetadata()
  local found = metadata:get("envoy.filters.http.grpc_field_extraction") or metadata:get("lingqu.rest")
  if found == nil then return end
  local name = found["model"] or found["model_name"] or found["name"]
  if type(name) == "table" then name = #name == 1 and name[1] or nil end
  if type(name) ~= "string" or name == "" or name == "<none>" then return end
  name = name:match("^[^@]*")
  local patterns = h:headers():get("x-lingqu-key-models")
  -- access.py has the words
  if not covered(patterns, name) then return h:respond({[":status"] = "403"}, "") end
  local other = h:headers():get("x-lingqu-fallback")
  -- As if there were no other model.
  if other ~= nil and not covered(patterns, other) then h:respond({[":status"] = "503"}, "") end
end
