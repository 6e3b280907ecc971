-- Refuses a request for a version that its model does not have. Runs only on the route for such requests.

function envoy_on_request(h)
  local state = h:streamInfo():filterState()
  local name = (state:get("lingqu.model") or ""):match("[%w%._%-]+") or ""
  local version = h:headers():get("lingqu-version") or (state:get("lingqu.version") or ""):match('^%["(.*)"%]$') or ""
  if #version > 32 or version:find("[^%w%-]") then return refuse(h, REFUSALS.malformed) end
  refuse(h, REFUSALS.unserved, name, version)
end
