-- Which version a request asks for behind its model's name: "model@canary", "model@3". The name without it becomes
-- the filter state that routes and limits look at, and the version the header lingqu-version, by which the route is
-- then chosen anew. Two wishes that differ are refused. Runs only on routes for models that are not there by the name.

local STATE = "lingqu.model"

function envoy_on_request(h)
  local state = h:streamInfo():filterState()
  local text = state:get(STATE)
  if text == nil then return end
  local quoted = text:match('^%["(.*)"%]$')
  local name, behind = (quoted or text):match("^([^@]*)@(.*)$")
  if name == nil then return end
  -- What is no name of a model stays as it is, and is refused as such.
  if #name == 0 or #name > 64 or name:find("[^%w%._%-]") then return end
  local found = h:streamInfo():dynamicMetadata():get("envoy.filters.http.grpc_field_extraction") or {}
  local own = found["model_version"] or found["version"]
  if type(own) == "table" then own = own[#own] end
  if own == "" then own = nil end
  local wanted
  for _, place in ipairs({ { behind }, { own }, { h:headers():get("lingqu-version") } }) do
    local version = place[1]
    if version ~= nil then
      if #version == 0 or #version > 32 or version:find("[^%w%-]") then
        return refuse(h, REFUSALS.malformed)
      end
      if wanted ~= nil and wanted ~= version then return refuse(h, REFUSALS.contradicted) end
      wanted = version
    end
  end
  state:set(STATE, "envoy.string", quoted and '["' .. name .. '"]' or name)
  h:headers():replace("lingqu-version", wanted)
  h:clearRouteCache()
end
