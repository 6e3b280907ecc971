-- What a tensor request needs to be for the version that its route says (`pin`): field 2 of every request of the Open
-- Inference Protocol. Field 1, the model's name, is put right where it came with a version. Empty where nothing is
-- needed; nil where the request was refused, since message and header ask for two versions.
local function pinned(h)
  local function first(value)
    if type(value) == "table" then value = value[1] end
    return value
  end
  local pin = h:metadata():get("pin")
  local found = h:streamInfo():dynamicMetadata():get("envoy.filters.http.grpc_field_extraction")
  if found == nil or pin == nil then return "" end
  local name, version = first(found["model_name"] or found["name"]), first(found["model_version"] or found["version"])
  local behind = name and name:find("@", 1, true)
  if version ~= nil and version ~= "" then
    if version ~= h:headers():get("lingqu-version") then
      refuse(h, REFUSALS.contradicted)
      return nil
    end
    if version == pin and not behind then return "" end
  end
  local suffix = field(2, pin)
  if behind then suffix = field(1, name:sub(1, behind - 1)) .. suffix end
  return suffix
end
