-- Puts into x-lingqu-prefix a number that is the same for prompts that begin alike, so that they go to the same
-- replica and find its prefix cache warm. It is made of the first 512 bytes of a prompt, or of a conversation up to
-- the end of its first message of a user: the same in all turns of it. Requests whose client says what they have in
-- common (lingqu-session) need none. Runs only on routes of models with a prefix cache.

local MOST, READ = 512, 8192

local function hash(text)
  local found = 0
  for at = 1, #text do found = (found * 31 + text:byte(at)) % 4294967291 end
  return tostring(found)
end

-- The field at `at` of a protobuf message: its number, where its content begins and ends; nil where none is whole.
local function field_at(bytes, at)
  local function number()
    local value, scale = 0, 1
    for _ = 1, 5 do
      local byte = bytes:byte(at)
      if byte == nil then return nil end
      value, scale, at = value + byte % 128 * scale, scale * 128, at + 1
      if byte < 128 then return value end
    end
    return nil
  end
  local tag = number()
  if tag == nil or tag % 8 ~= 2 then return nil end -- what a prompt has before its text is of this kind
  local length = number()
  if length == nil then return nil end
  return math.floor(tag / 8), at, at + length - 1
end

-- GenerateRequest: model = 1, prompt = 2, messages = 3 {role = 1, content = 2}.
local function of_message(bytes)
  local text, at = "", 6
  while #text < MOST do
    local number, from, to = field_at(bytes, at)
    if number == nil or number > 3 then break end
    at = to + 1
    if number == 2 then return bytes:sub(from, to) end
    if number == 3 then
      local user, inner = false, from
      while inner <= to do
        local part, first, last = field_at(bytes, inner)
        if part == nil then break end
        if part == 1 then user = bytes:sub(first, last) == "user" end
        if part == 2 then text = text .. bytes:sub(first, math.min(last, to)) end
        inner = last + 1
      end
      if user then break end
    end
  end
  return text
end

-- JSON as clients write it; what it does not understand begins where the prompt does.
local function of_json(bytes)
  local from = bytes:find('"messages"', 1, true) or bytes:find('"prompt"', 1, true)
  if from == nil then return "" end
  local _, role = bytes:find('"role"%s*:%s*"user"', from)
  local _, to = bytes:find('"content"%s*:%s*".-[^\\]"', role or #bytes)
  return bytes:sub(from, to or #bytes)
end

function envoy_on_request(h)
  local headers = h:headers()
  if headers:get("lingqu-session") ~= nil then return end
  local path = headers:get(":path")
  local grpc = path:find("Generate", 1, true) ~= nil
  if not grpc and not path:find("completions", 1, true) then return end
  local body = h:body(true)
  local bytes = body:getBytes(0, math.min(body:length(), READ))
  local text = grpc and of_message(bytes) or of_json(bytes)
  if #text > 0 then h:headers():replace("x-lingqu-prefix", hash(text:sub(1, MOST))) end
end
